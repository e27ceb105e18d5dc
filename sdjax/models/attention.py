"""Attention, and the transformer blocks that are made of it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Unpack

import jax.numpy as jnp
from flax import nnx
from jax import Array

from sdjax.models.layers import Conv, GroupNorm, LayerArgs, added, conv, layer_norm, linear, recomputed, repeated
from sdjax.ops.activations import geglu
from sdjax.ops.attention import attention


class KeysValues(NamedTuple):
    """Of tokens that are not among the text states, each [k B N C]."""

    keys: Array
    values: Array
    mask: Array | None = None
    """[k B L] how much of what each pixel attends to counts"""

    def apart(self, masks: Array) -> "list[KeysValues]":
        """Those of each of n pictures, whose tokens stand one after the other, with its mask of [B n L]."""
        n = masks.shape[1]
        keys, values = (jnp.split(own, n, axis=1) for own in (self.keys, self.values))
        return [KeysValues(*own, masks[:, i]) for i, own in enumerate(zip(keys, values, strict=True))]


Pictures = Mapping[str, Sequence[KeysValues]]
"""By the name of a transformer block in the UNet, what each IP-Adapter makes of its pictures: `models.ip_adapter`"""


class Context(NamedTuple):
    """What a transformer attends to beside its own pixels."""

    text: Array
    """[k B M D] the states of the texts"""
    pictures: Pictures | None = None
    perturbed: Mapping[str, Array] | None = None
    """by the name of a transformer block, [k B] 1 where its pixels attend to themselves alone (PAG)"""


class Attention(nnx.Module):
    """to_out(attention(to_q(x), to_k(context), to_v(context))): [B L C], [k B M D] -> [k B L C]

    Without a context x attends to itself. To each of `more` it attends apart: to_out takes the sum. Where `alone` [k B]
    is 1 each pixel attends to itself alone: to_out takes to_v(x).
    """

    def __init__(
        self, channels: int, heads: int, *, context_channels: int | None = None, qkv_bias: bool, **kw: Unpack[LayerArgs]
    ):
        cin = context_channels or channels
        self.heads = heads
        self.to_q = linear(channels, channels, use_bias=qkv_bias, **kw)
        self.to_k = linear(cin, channels, use_bias=qkv_bias, **kw)
        self.to_v = linear(cin, channels, use_bias=qkv_bias, **kw)
        self.to_out = nnx.List([linear(channels, channels, **kw)])

    def __call__(
        self,
        x: Array,
        context: Array | None = None,
        more: Sequence[KeysValues] = (),
        alone: Array | None = None,
    ) -> Array:
        context = x if context is None else context
        q, k, v = (split_heads(y, self.heads) for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        q = repeated(q, k)
        y = attention(q, k, v)
        for own in more:
            seen = attention(q, split_heads(own.keys, self.heads), split_heads(own.values, self.heads))
            y += seen if own.mask is None else (own.mask[..., None, None] * seen).astype(y.dtype)
        if alone is not None:
            y, v = repeated(y, alone), repeated(v, alone)
            y = jnp.where(alone[:, None, None, None] > 0, v, y)
        return self.to_out[0](y.reshape(*y.shape[:2], -1))


def split_heads(x: Array, heads: int) -> Array:
    """[B L H*D] -> [B L H D]"""
    return x.reshape(*x.shape[:2], heads, -1)


class SpatialAttention(Attention):
    """x + attention(group_norm(x)) over the pixels of x: [B H W C] -> [B H W C]. The middle of the VAE."""

    def __init__(self, channels: int, heads: int, *, groups: int, eps: float, **kw: Unpack[LayerArgs]):
        super().__init__(channels, heads, qkv_bias=True, **kw)
        self.group_norm = GroupNorm(channels, groups=groups, eps=eps, **kw)

    def __call__(self, x: Array) -> Array:
        B, H, W, C = x.shape
        return x + super().__call__(self.group_norm(x).reshape(B, H * W, C)).reshape(x.shape)


class GEGLU(nnx.Module):
    """a * gelu(b) with a, b = proj(x): [... cin] -> [... cout]"""

    def __init__(self, cin: int, cout: int, **kw: Unpack[LayerArgs]):
        self.proj = linear(cin, 2 * cout, **kw)

    def __call__(self, x: Array) -> Array:
        return geglu(self.proj(x))


class FeedForward(nnx.Module):
    """linear(GEGLU(x)), four times as wide inside. Checkpoints count a dropout as `net.1`."""

    def __init__(self, channels: int, **kw: Unpack[LayerArgs]):
        self.net = nnx.Dict({"0": GEGLU(channels, 4 * channels, **kw), "2": linear(4 * channels, channels, **kw)})

    def __call__(self, x: Array) -> Array:
        return self.net["2"](self.net["0"](x))


class BasicTransformerBlock(nnx.Module):
    """x += attn1(norm1(x)); x += attn2(norm2(x), context); x += ff(norm3(x)): [B L C], [k B ...] -> [k B L C]

    only_cross_attention: attn1 attends to the texts as well. `name`: that of the block in the UNet, see `Context`.
    """

    name = ""
    is_recomputed = False

    def __init__(
        self, channels: int, heads: int, context_channels: int, *, only_cross_attention: bool, **kw: Unpack[LayerArgs]
    ):
        self.only_cross_attention = only_cross_attention
        first_context = context_channels if only_cross_attention else None
        self.norm1 = layer_norm(channels, **kw)
        self.attn1 = Attention(channels, heads, context_channels=first_context, qkv_bias=False, **kw)
        self.norm2 = layer_norm(channels, **kw)
        self.attn2 = Attention(channels, heads, context_channels=context_channels, qkv_bias=False, **kw)
        self.norm3 = layer_norm(channels, **kw)
        self.ff = FeedForward(channels, **kw)

    @recomputed
    def __call__(self, x: Array, context: Context) -> Array:
        first, alone = context.text if self.only_cross_attention else None, (context.perturbed or {}).get(self.name)
        x = added(x, self.attn1(self.norm1(x), first, alone=alone))
        more = () if context.pictures is None else context.pictures[self.name]
        x = added(x, self.attn2(self.norm2(x), context.text, more))
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """x + proj_out(blocks(proj_in(norm(x)), context)) over the pixels of x: [B H W C], [k B ...] -> [k B H W C]

    The projections are 1x1 convolutions in SD 1 and linear layers in SD 2: the same product, another weight shape.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        context_channels: int,
        *,
        layers: int,
        groups: int,
        use_linear_projection: bool,
        only_cross_attention: bool,
        **kw: Unpack[LayerArgs],
    ):
        project = linear if use_linear_projection else pointwise_conv
        self.norm = GroupNorm(channels, groups=groups, eps=1e-6, **kw)
        self.proj_in = project(channels, channels, **kw)
        self.transformer_blocks = nnx.List(
            BasicTransformerBlock(channels, heads, context_channels, only_cross_attention=only_cross_attention, **kw)
            for _ in range(layers)
        )
        self.proj_out = project(channels, channels, **kw)

    def __call__(self, x: Array, context: Context) -> Array:
        B, H, W, C = x.shape
        h = self.proj_in(self.norm(x)).reshape(B, H * W, C)
        for block in self.transformer_blocks:
            h = block(h, context)
        return added(x, self.proj_out(h.reshape(-1, H, W, C)))


def pointwise_conv(cin: int, cout: int, **kw: Unpack[LayerArgs]) -> Conv:
    """A 1x1 convolution."""
    return conv(cin, cout, 1, **kw)
