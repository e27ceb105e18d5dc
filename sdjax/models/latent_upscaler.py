"""The UNet of the x2 latent upscaler: of k-diffusion's kind, whose norms read the noise level and the text."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Unpack

import jax.numpy as jnp
from flax import nnx
from jax import Array

from sdjax.checkpoints.errors import CheckpointError
from sdjax.fields import Channels, Epsilon, Levels, Within
from sdjax.models.attention import Attention
from sdjax.models.base import Model, ModelConfig
from sdjax.models.layers import LayerArgs, conv, layer_norm, linear, repeated
from sdjax.models.unet_blocks import at
from sdjax.models.unet_encoder import Layers, Size, Waves
from sdjax.ops.activations import gelu
from sdjax.ops.normalization import group_norm

GROUP = 32  # channels
EPS = 1e-5  # of the norms before attention
LEVEL_WAVES = 64  # cosines and as many sines of the noise level of the picture, which is 0
POOLED = "pooled"


@dataclass(frozen=True)
class LatentUpscalerConfig(ModelConfig):
    """The fields of the `unet/config.json` of the x2 latent upscaler.

    `attention_head_dim` is the width of a head. `time_cond_proj_dim` is the width of the pooled text, and 128.
    """

    sample_size: Size | tuple[Size, Size] | None = None
    in_channels: Channels = 4
    out_channels: Channels = 4
    flip_sin_to_cos: bool = True
    down_block_types: Annotated[tuple[str, ...], Levels] = ("KDownBlock2D",) + ("KCrossAttnDownBlock2D",) * 3
    up_block_types: Annotated[tuple[str, ...], Levels] = ("KCrossAttnUpBlock2D",) * 3 + ("KUpBlock2D",)
    block_out_channels: Annotated[tuple[Waves, ...], Within(2, 6)] = (384, 384, 768, 768)
    layers_per_block: Layers | tuple[Layers, ...] = 2
    norm_eps: Epsilon = 1e-5
    cross_attention_dim: Channels = 1280
    attention_head_dim: Channels = 8
    time_cond_proj_dim: Waves = 896
    norm_num_groups: int | None = None
    mid_block_type: str | None = None
    act_fn: str = "gelu"
    conv_in_kernel: int = 1
    conv_out_kernel: int = 1
    resnet_time_scale_shift: str = "scale_shift"
    time_embedding_type: str = "fourier"
    timestep_post_act: str | None = "gelu"

    neutral: ClassVar = {
        "down_block_types": {"KDownBlock2D", "KCrossAttnDownBlock2D"},
        "up_block_types": {"KUpBlock2D", "KCrossAttnUpBlock2D"},
        "norm_num_groups": {None},
        "mid_block_type": {None},
        "act_fn": {"gelu"},
        "conv_in_kernel": {1},
        "conv_out_kernel": {1},
        "resnet_time_scale_shift": {"scale_shift"},
        "time_embedding_type": {"fourier"},
        "timestep_post_act": {"gelu"},
    }
    unsupported: ClassVar = {
        "addition_embed_type_num_heads": 64,
        "attention_type": "default",
        "cross_attention_norm": "layer_norm",
        "downsample_padding": 1,
        "freq_shift": 0,
        "mid_block_scale_factor": 1,
        "resnet_out_scale_factor": 1,
        "transformer_layers_per_block": 1,
        "upcast_attention": True,
    }
    per_level: ClassVar = ("block_out_channels", "down_block_types", "up_block_types", "layers_per_block")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_divides("the width of a group", GROUP, self.block_out_channels)
        self.check_divides("attention_head_dim", self.attention_head_dim, self.block_out_channels)
        *others, above, last = self.block_out_channels
        if not above == last == self.temb_channels or (others and others[-1] == above):
            raise CheckpointError(
                f"{type(self).__name__}: block_out_channels={self.block_out_channels}: the last two, and these alone, "
                "are twice the first"
            )
        if "CrossAttn" not in self.up_block_types[0]:
            raise CheckpointError(
                f"{type(self).__name__}: up_block_types={self.up_block_types}: no attention in the first"
            )

    @property
    def addition_embed_type(self) -> str:
        """What it is conditioned on beside the text states, in the words of other UNets."""
        return POOLED

    @property
    def predicted_channels(self) -> int:
        """Of what is predicted: all but the last are used."""
        return self.out_channels - 1

    @property
    def halvings(self) -> int:
        """How many times both sides of the latents are halved, which are multiples of 2^halvings."""
        return len(self.block_out_channels) - 1

    @property
    def pooled_channels(self) -> int:
        """Of the pooled text."""
        return self.time_cond_proj_dim - 2 * LEVEL_WAVES

    @property
    def temb_channels(self) -> int:
        """Of the embedding of everything but the sample and the text states."""
        return 2 * self.block_out_channels[0]


class AdaGroupNorm(nnx.Module):
    """scale, shift = linear(temb); (x - mean) / sqrt(var + eps) * (1 + scale) + shift: [B H W C], [B T] -> [B H W C]"""

    def __init__(self, temb_channels: int, channels: int, *, groups: int, eps: float, **kw: Unpack[LayerArgs]):
        self.groups, self.eps = groups, eps
        self.linear = linear(temb_channels, 2 * channels, **kw)

    def __call__(self, x: Array, temb: Array) -> Array:
        scale, shift = jnp.split(self.linear(temb)[:, None, None], 2, axis=-1)
        one = jnp.ones(x.shape[-1], jnp.float32)
        return group_norm(x, one, 0 * one, groups=self.groups, eps=self.eps) * (1 + scale) + shift


class ResnetBlock(nnx.Module):
    """shortcut(x) + conv2(gelu(norm2(conv1(gelu(norm1(x, temb))), temb))): [B H W cin] -> [B H W cout]"""

    def __init__(
        self, cin: int, mid: int, cout: int, temb_channels: int, groups: int, *, eps: float, **kw: Unpack[LayerArgs]
    ):
        self.norm1 = AdaGroupNorm(temb_channels, cin, groups=cin // GROUP, eps=eps, **kw)
        self.conv1 = conv(cin, mid, 3, **kw)
        self.norm2 = AdaGroupNorm(temb_channels, mid, groups=groups, eps=eps, **kw)
        self.conv2 = conv(mid, cout, 3, **kw)
        self.conv_shortcut = conv(cin, cout, 1, use_bias=False, **kw) if cin != cout else None

    def __call__(self, x: Array, temb: Array) -> Array:
        h = self.conv1(gelu(self.norm1(x, temb)))
        h = self.conv2(gelu(self.norm2(h, temb)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class NormedAttention(Attention):
    """`Attention` to the layer norm of the context."""

    def __init__(self, channels: int, heads: int, *, context_channels: int, **kw: Unpack[LayerArgs]):
        super().__init__(channels, heads, context_channels=context_channels, qkv_bias=True, **kw)
        self.norm_cross = layer_norm(context_channels, **kw)

    def __call__(self, x: Array, context: Array) -> Array:
        return super().__call__(x, self.norm_cross(context))


class AttentionBlock(nnx.Module):
    """x += attn1(norm1(x)) if there is self-attention; x + attn2(norm2(x), text): [B H W C] -> [B H W C]"""

    def __init__(self, config: LatentUpscalerConfig, channels: int, *, attends_itself: bool, **kw: Unpack[LayerArgs]):
        heads, temb = channels // config.attention_head_dim, config.temb_channels
        norm = {"groups": max(1, channels // GROUP), "eps": EPS}
        if attends_itself:
            self.norm1 = AdaGroupNorm(temb, channels, **norm, **kw)
            self.attn1 = Attention(channels, heads, qkv_bias=True, **kw)
        self.norm2 = AdaGroupNorm(temb, channels, **norm, **kw)
        self.attn2 = NormedAttention(channels, heads, context_channels=config.cross_attention_dim, **kw)
        self.attends_itself = attends_itself

    def __call__(self, x: Array, temb: Array, text: Array) -> Array:
        B, H, W, C = x.shape
        if self.attends_itself:
            x += self.attn1(self.norm1(x, temb).reshape(B, H * W, C)).reshape(x.shape)
        return x + self.attn2(self.norm2(x, temb).reshape(B, H * W, C), text).reshape(x.shape)


class Block(nnx.Module):
    """A level: residual blocks, of these widths (cin, mid, cout), each followed by attention where there is any."""

    def __init__(
        self,
        config: LatentUpscalerConfig,
        width: int,
        widths: list[tuple[int, int, int]],
        *,
        cross: bool,
        attends_itself: bool,
        **kw: Unpack[LayerArgs],
    ):
        temb, options = config.temb_channels, {"eps": config.norm_eps, **kw}
        self.resnets = nnx.List(ResnetBlock(*own, temb, width // GROUP, **options) for own in widths)
        self.attentions = nnx.List(
            AttentionBlock(config, cout, attends_itself=attends_itself, **kw) for *_, cout in (widths if cross else ())
        )

    def __call__(self, x: Array, temb: Array, text: Array) -> Array:
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if self.attentions:
                x = self.attentions[i](x, temb, text)
        return x


def down_block(config: LatentUpscalerConfig, level: int, **kw: Unpack[LayerArgs]) -> Block:
    """A level on the way down. The coarsest one's pixels attend to each other."""
    channels, layers = config.block_out_channels, at(config.layers_per_block, level)
    width, above = channels[level], channels[max(level - 1, 0)]
    widths = [(above if i == 0 else width, width, width) for i in range(layers)]
    cross, is_last = "CrossAttn" in config.down_block_types[level], level == len(channels) - 1
    return Block(config, width, widths, cross=cross, attends_itself=is_last, **kw)


def up_block(config: LatentUpscalerConfig, level: int, **kw: Unpack[LayerArgs]) -> Block:
    """A level on the way up, that also reads what the way down left there, but for the first. It ends as wide as the
    next one. The first one's pixels attend to each other."""
    channels, layers = config.block_out_channels, at(config.layers_per_block, level)
    width, above = channels[level], channels[max(level - 1, 0)]
    cross = "CrossAttn" in config.up_block_types[len(channels) - 1 - level]
    is_first = level == len(channels) - 1
    widths = [(width, width, width)] * layers
    widths[0] = (width if is_first else 2 * width, width, width)
    widths[-1] = (widths[-1][0], width if cross else above, above)
    return Block(config, width, widths, cross=cross, attends_itself=is_first, **kw)


class Fourier(nnx.Module):
    """cos and sin of 2 pi t weight, or sines first unless flipped: [B] -> [B 2N]. All is float32."""

    def __init__(self, waves: int, *, flip_sin_to_cos: bool):
        self.weight = nnx.Param(jnp.zeros(waves, jnp.float32))
        self.flip_sin_to_cos = flip_sin_to_cos

    def __call__(self, t: Array) -> Array:
        angles = t.astype(jnp.float32)[:, None] * self.weight[...] * (2 * math.pi)
        parts = (jnp.cos(angles), jnp.sin(angles))
        return jnp.concatenate(parts if self.flip_sin_to_cos else parts[::-1], axis=-1)


class TimeEmbedding(nnx.Module):
    """gelu(linear_2(gelu(linear_1(x + cond_proj(condition))))): [B T], [B D] -> [B T]"""

    def __init__(self, channels: int, cond_channels: int, **kw: Unpack[LayerArgs]):
        self.linear_1 = linear(channels, channels, **kw)
        self.cond_proj = linear(cond_channels, channels, use_bias=False, **kw)
        self.linear_2 = linear(channels, channels, **kw)

    def __call__(self, x: Array, condition: Array) -> Array:
        return gelu(self.linear_2(gelu(self.linear_1(x + self.cond_proj(condition)))))


class LatentUpscaler(Model):
    """[B h w 2C] noisy latents beside those of the picture, [B] log(sigma) / 4, [B L D] text states, [B P] pooled texts
    -> [B h w C] velocity

    h and w are multiples of 2^(levels - 1). With k times as many texts there are k predictions of each image, B after
    B. The network's own output is the negative velocity of a variance preserving process (Karras et al. 2022, table 1,
    with sigma_data = 1), and one channel that is not used.
    """

    config_class = LatentUpscalerConfig
    saved_as = "UNet2DConditionModel"

    def __init__(self, config: LatentUpscalerConfig, **kw: Unpack[LayerArgs]):
        self.config = config
        width, temb, levels = config.block_out_channels[0], config.temb_channels, range(len(config.block_out_channels))
        self.conv_in = conv(config.in_channels, width, 1, **kw)
        self.time_proj = Fourier(temb // 2, flip_sin_to_cos=config.flip_sin_to_cos)
        self.time_embedding = TimeEmbedding(temb, config.time_cond_proj_dim, **kw)
        self.down_blocks = nnx.List(down_block(config, level, **kw) for level in levels)
        self.up_blocks = nnx.List(up_block(config, level, **kw) for level in reversed(levels))
        self.conv_out = conv(width, config.out_channels, 1, **kw)

    @classmethod
    def takes(cls, config: Mapping[str, Any]) -> bool:
        """By the first of its blocks."""
        kinds = config.get("down_block_types") or [None]
        return isinstance(kinds, list | tuple) and str(kinds[0]).startswith("K")

    def transformer_blocks(self) -> dict[str, nnx.Module]:
        """None that are like those of other UNets."""
        return {}

    def __call__(self, sample: Array, timesteps: Array, encoder_hidden_states: Array, *, text_embeds: Array) -> Array:
        x, t = (repeated(own, text_embeds) for own in (sample, jnp.broadcast_to(timesteps, sample.shape[:1])))
        clean = jnp.repeat(jnp.array([1, 0], text_embeds.dtype), LEVEL_WAVES)  # cosines and sines of 0
        clean = jnp.broadcast_to(clean, (len(text_embeds), len(clean)))
        temb = self.time_embedding(self.time_proj(t), jnp.concatenate([clean, text_embeds], axis=-1))
        x, skips = self.conv_in(x), []
        for block in self.down_blocks:
            x = x if block is self.down_blocks[0] else smaller(x)
            x = block(x, temb, encoder_hidden_states)
            skips.append(x)
        skips.pop()
        for i, block in enumerate(self.up_blocks):
            if i:
                x = jnp.concatenate([larger(x), skips.pop()], axis=-1)
            x = block(x, temb, encoder_hidden_states)
        return -self.conv_out(x)[..., :-1]


def smaller(x: Array) -> Array:
    """[B H W C] -> [B H/2 W/2 C], each axis by the taps 1/8, 3/8, 3/8, 1/8, the picture reflected at its edges"""
    for axis in (1, 2):
        padded = reflected(x, axis)
        first, second, third, fourth = (
            jnp.take(padded, jnp.arange(x.shape[axis] // 2) * 2 + tap, axis=axis) for tap in range(4)
        )
        x = ((first + fourth) + 3 * (second + third)) / 8
    return x


def larger(x: Array) -> Array:
    """[B H W C] -> [B 2H 2W C], each axis by the taps 1/4, 3/4 of the nearest two, reflected at the edges"""
    for axis in (1, 2):
        padded, n = reflected(x, axis), x.shape[axis]
        before, after = (jnp.take(padded, jnp.arange(n) + tap, axis=axis) for tap in (0, 2))
        pairs = jnp.stack([3 * x + before, 3 * x + after], axis=axis + 1) / 4
        x = pairs.reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 1 :])
    return x


def reflected(x: Array, axis: int) -> Array:
    """x with one more pixel at both ends of an axis, as in a mirror through the last pixel's centre."""
    return jnp.pad(x, [(1, 1) if i == axis else (0, 0) for i in range(x.ndim)], mode="reflect")
