"""The layers that every model is made of: convolution, normalisation, resizing, residual block, time embedding."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from sdjax.ops.activations import silu
from sdjax.ops.convolution import convolution, convolution_of_doubled, doubled
from sdjax.ops.normalization import group_norm
from sdjax.ops.product import product


class LayerArgs(TypedDict, total=False):
    """What every layer takes: the dtype it computes in, that of its parameters, how and from what keys they start."""

    dtype: DTypeLike
    param_dtype: DTypeLike
    init: Initializer
    rngs: nnx.Rngs


def shape_only(key: Any, shape: Sequence[int], dtype: DTypeLike = jnp.float32, *_: Any) -> jax.ShapeDtypeStruct:
    """In place of an initializer: the parameter is only described, which takes no trace."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


def recomputed(call: Callable[..., Array]) -> Callable[..., Array]:
    """Of a module's `__call__`: where the module's `is_recomputed` is set, a gradient keeps what the call is given and
    computes it once more, in place of all that is computed in it (`jax.checkpoint`, arXiv:1604.06174)."""

    @functools.wraps(call)
    def wrapped(self: nnx.Module, *args: Any) -> Array:
        own = functools.partial(call, self)
        return (jax.checkpoint(own) if self.is_recomputed else own)(*args)

    return wrapped


INIT = nnx.initializers.lecun_normal()
EMBEDDING_INIT = nnx.initializers.normal(0.02)  # for tokens and positions alike, however many there are of each


class Change(Protocol):
    """What is trained of a layer in place of its parameters: `models.low_rank`."""

    def __call__(self, layer: Any, x: Array, y: Array, *, is_doubled: bool = False) -> Array:
        """From what a layer reads, x, and makes of it, y, to what it makes with the change."""


class Linear(nnx.Linear):
    """x W + b over the last axis: [... cin] -> [... cout], with a `Change` if it has one. Sums are float32."""

    lora: Change | None = None

    def __call__(self, x: Array) -> Array:
        bias = None if self.bias is None else self.bias[...]
        y = product(*self.promote_dtype((x, self.kernel[...], bias), dtype=self.dtype))
        return y if self.lora is None else self.lora(self, x, y)


def _constant(init: Initializer, value: float) -> Initializer:
    """Of a bias or a scale, beside weights that start so."""
    return init if init is shape_only else nnx.initializers.constant(value)


def linear(cin: int, cout: int, *, use_bias: bool = True, init: Initializer = INIT, **kw: Unpack[LayerArgs]) -> Linear:
    """x W + b over the last axis."""
    return Linear(cin, cout, use_bias=use_bias, kernel_init=init, bias_init=_constant(init, 0), **kw)


def embedding(count: int, channels: int, *, init: Initializer = EMBEDDING_INIT, **kw: Unpack[LayerArgs]) -> nnx.Embed:
    """A row of a table for each id."""
    return nnx.Embed(count, channels, embedding_init=init, **kw)


class Conv(nnx.Conv):
    """A 2D convolution and a bias: [B H W cin] -> [B H' W' cout], with a `Change` if it has one. Sums are float32."""

    lora: Change | None = None

    def __call__(self, x: Array) -> Array:
        y = convolution(*self._operands(x), strides=self.strides, padding=self.padding)
        return y if self.lora is None else self.lora(self, x, y)

    def of_doubled(self, x: Array) -> Array:
        """The same of x at twice its size, nearest neighbour, for a 3x3 convolution that keeps the size."""
        y = convolution_of_doubled(*self._operands(x))
        return y if self.lora is None else self.lora(self, x, y, is_doubled=True)

    def _operands(self, x: Array) -> tuple[Array, Array, Array | None]:
        bias = None if self.bias is None else self.bias[...]
        return self.promote_dtype((x, self.kernel[...], bias), dtype=self.dtype)


def conv(
    cin: int,
    cout: int,
    size: int,
    *,
    stride: int = 1,
    padding: int | Sequence[tuple[int, int]] | None = None,
    init: Initializer = INIT,
    **kw: Unpack[LayerArgs],
) -> Conv:
    """A 2D convolution, NHWC. Padding is always numbers; None keeps the size at stride 1.

    "SAME" would pad (0, 1) at stride 2, where the UNet needs (1, 1).
    """
    padding = size // 2 if padding is None else padding
    pads = ((padding, padding),) * 2 if isinstance(padding, int) else tuple(map(tuple, padding))
    inits = {"kernel_init": init, "bias_init": _constant(init, 0)}
    return Conv(cin, cout, (size, size), strides=(stride, stride), padding=pads, **inits, **kw)


class GroupNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias over groups of channels (arXiv:1803.08494): [B H W C] -> [B H W C]"""

    def __init__(
        self,
        channels: int,
        *,
        groups: int,
        eps: float,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        init: Initializer = INIT,
        **_: Unpack[LayerArgs],
    ):
        self.groups, self.eps, self.dtype = groups, eps, dtype
        self.scale, self.bias = (nnx.Param(_constant(init, value)(None, (channels,), param_dtype)) for value in (1, 0))

    def __call__(self, x: Array) -> Array:
        normed = group_norm(x, self.scale[...], self.bias[...], groups=self.groups, eps=self.eps)
        return normed.astype(self.dtype or x.dtype)


def layer_norm(channels: int, *, eps: float = 1e-5, init: Initializer = INIT, **kw: Unpack[LayerArgs]) -> nnx.LayerNorm:
    """(x - mean) / sqrt(var + eps) * scale + bias over channels, with the exact two-pass float32 variance."""
    inits = {"scale_init": _constant(init, 1), "bias_init": _constant(init, 0)}
    return nnx.LayerNorm(channels, epsilon=eps, use_fast_variance=False, **inits, **kw)


def added(x: Array, y: Array) -> Array:
    """x + y, each as often as it is `repeated` for the other."""
    return repeated(x, y) + repeated(y, x)


def repeated(x: Array, other: Array) -> Array:
    """x [B ...] -> [k B ...], k times one after the other for `other` [k B ...]; x itself where that has no more.

    What does not depend on the prompt is computed once for the pictures with and without it, and repeated where a
    prompt comes in.
    """
    times = len(other) // len(x)
    return jnp.concatenate([x] * times) if times > 1 else x


def side_by_side(x: Array, n: int) -> Array:
    """[B H W C] -> [B H/n W/n C*n*n]: the pixels of each square of n x n as channels."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // n, n, W // n, n, C)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(B, H // n, W // n, C * n * n)


class ResnetBlock(nnx.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x))) + proj(silu(temb)))))

    UNet: eps=1e-5.  VAE: eps=1e-6 and no time embedding (temb_channels=None).
    """

    is_recomputed = False

    def __init__(
        self, cin: int, cout: int, temb_channels: int | None, *, groups: int, eps: float, **kw: Unpack[LayerArgs]
    ):
        self.norm1 = GroupNorm(cin, groups=groups, eps=eps, **kw)
        self.conv1 = conv(cin, cout, 3, **kw)
        self.time_emb_proj = linear(temb_channels, cout, **kw) if temb_channels else None
        self.norm2 = GroupNorm(cout, groups=groups, eps=eps, **kw)
        self.conv2 = conv(cout, cout, 3, **kw)
        self.conv_shortcut = conv(cin, cout, 1, **kw) if cin != cout else None

    @recomputed
    def __call__(self, x: Array, temb: Array | None = None) -> Array:
        h = self.conv1(silu(self.norm1(x)))  # [B H W cin] -> [B H W cout]
        if self.time_emb_proj is not None:
            h = added(h, self.time_emb_proj(silu(temb))[:, None, None])  # [B T] -> [B 1 1 cout]
        h = self.conv2(silu(self.norm2(h)))
        return added(x if self.conv_shortcut is None else self.conv_shortcut(x), h)


class Downsample(nnx.Module):
    """A 3x3 convolution of stride 2: [B H W C] -> [B H/2 W/2 C]

    The UNet pads 1 on each side, the VAE only at the bottom and the right.
    """

    def __init__(self, channels: int, padding: Sequence[tuple[int, int]], **kw: Unpack[LayerArgs]):
        self.conv = conv(channels, channels, 3, stride=2, padding=padding, **kw)

    def __call__(self, x: Array) -> Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest neighbour to twice the size, cropped to `size` if given, then a 3x3 convolution.

    The crop is what nearest resizing to an odd size gives: floor(i * n / (2 n - 1)) = floor(i / 2).
    """

    def __init__(self, channels: int, **kw: Unpack[LayerArgs]):
        self.conv = conv(channels, channels, 3, **kw)

    def __call__(self, x: Array, size: tuple[int, int] | None = None) -> Array:
        if size in (None, (2 * x.shape[1], 2 * x.shape[2])):
            return self.conv.of_doubled(x)
        return self.conv(doubled(x)[:, : size[0], : size[1]])


def timestep_embedding(t: Array, channels: int, *, flip_sin_to_cos: bool, freq_shift: float) -> Array:
    """[sin(t w_k), cos(t w_k)] with w_k = 10000^(-k / (channels/2 - freq_shift)): [B] -> [B channels], float32.

    DDPM (arXiv:2006.11239), from the positional encoding of arXiv:1706.03762, section 3.5; flipped: cosines first.
    """
    half = channels // 2
    freqs = jnp.exp(-math.log(10000) / (half - freq_shift) * jnp.arange(half, dtype=jnp.float32))
    angles = t.astype(jnp.float32)[:, None] * freqs
    parts = (jnp.cos(angles), jnp.sin(angles)) if flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    return jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (0, channels % 2)))


class TimestepEmbedding(nnx.Module):
    """linear_2(silu(linear_1(x + cond_proj(condition)))): [B cin], [B cond_channels] -> [B cout]

    Without cond_channels there is no condition.
    """

    def __init__(self, cin: int, cout: int, *, cond_channels: int | None = None, **kw: Unpack[LayerArgs]):
        self.linear_1 = linear(cin, cout, **kw)
        self.cond_proj = linear(cond_channels, cin, use_bias=False, **kw) if cond_channels else None
        self.linear_2 = linear(cout, cout, **kw)

    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        if self.cond_proj is not None:
            x += self.cond_proj(condition)
        return self.linear_2(silu(self.linear_1(x)))
