"""The conditional UNet of latent diffusion (arXiv:2112.10752): predicts noise, velocity or the clean latents."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import jax.numpy as jnp
from flax import nnx
from jax import Array

from sdjax.models.attention import Transformer2DModel
from sdjax.models.base import Model, ModelConfig
from sdjax.models.layers import (
    Downsample,
    GroupNorm,
    LayerArgs,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    conv,
    timestep_embedding,
)


@dataclass(frozen=True)
class UNet2DConditionConfig(ModelConfig):
    """The fields of a diffusers `unet/config.json`, with its defaults.

    `attention_head_dim` is, in every published checkpoint, the number of heads (an old misnomer).
    """

    sample_size: int | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False

    neutral: ClassVar = {
        "down_block_types": {"CrossAttnDownBlock2D", "DownBlock2D"},
        "mid_block_type": {"UNetMidBlock2DCrossAttn"},
        "up_block_types": {"CrossAttnUpBlock2D", "UpBlock2D"},
        "act_fn": {"silu", "swish"},
    }
    unsupported: ClassVar = {
        "addition_embed_type_num_heads": 64,
        "attention_type": "default",
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "downsample_padding": 1,
        "dropout": 0.0,
        "mid_block_scale_factor": 1,
        "resnet_out_scale_factor": 1,
        "resnet_time_scale_shift": "default",
        "time_embedding_type": "positional",
        "upcast_attention": True,  # scores and softmax always are float32
    }
    per_level: ClassVar = (
        "block_out_channels",
        "down_block_types",
        "up_block_types",
        "only_cross_attention",
        "layers_per_block",
        "cross_attention_dim",
        "transformer_layers_per_block",
        "attention_head_dim",
    )


def at(value: Any, level: int) -> Any:
    """A config value that is one for all levels or one for each."""
    return value[level] if isinstance(value, tuple) else value


class Block(nnx.Module):
    """Residual blocks, each followed by a transformer where cross is true: what all levels of the UNet share.

    widths: (channels in, channels out) of each residual block; level 0 is the finest.
    """

    def __init__(
        self,
        config: UNet2DConditionConfig,
        level: int,
        widths: list[tuple[int, int]],
        *,
        cross: bool,
        **kw: Unpack[LayerArgs],
    ):
        groups = config.norm_num_groups
        temb_channels = 4 * config.block_out_channels[0]
        self.resnets = nnx.List(
            ResnetBlock(cin, cout, temb_channels, groups=groups, eps=config.norm_eps, **kw) for cin, cout in widths
        )
        self.attentions = nnx.List(
            Transformer2DModel(
                cout,
                at(config.attention_head_dim, level),
                at(config.cross_attention_dim, level),
                layers=at(config.transformer_layers_per_block, level),
                groups=groups,
                use_linear_projection=config.use_linear_projection,
                only_cross_attention=at(config.only_cross_attention, level),
                **kw,
            )
            for _, cout in widths
            if cross
        )

    def layer(self, i: int, x: Array, temb: Array, context: Array) -> Array:
        """The i-th residual block and the transformer after it, if there is one."""
        x = self.resnets[i](x, temb)
        return self.attentions[i](x, context) if self.attentions else x


class DownBlock(Block):
    """A level on the way down: returns what each of its layers gave, for the way up."""

    def __init__(self, config: UNet2DConditionConfig, level: int, *, cross: bool, **kw: Unpack[LayerArgs]):
        channels = config.block_out_channels
        cin, cout = channels[max(level - 1, 0)], channels[level]
        widths = [(cin if i == 0 else cout, cout) for i in range(at(config.layers_per_block, level))]
        super().__init__(config, level, widths, cross=cross, **kw)
        last = level == len(channels) - 1
        self.downsamplers = nnx.List([] if last else [Downsample(cout, ((1, 1), (1, 1)), **kw)])

    def __call__(self, x: Array, temb: Array, context: Array) -> list[Array]:
        outputs = []
        for i in range(len(self.resnets)):
            outputs.append(x := self.layer(i, x, temb, context))
        for downsample in self.downsamplers:
            outputs.append(x := downsample(x))
        return outputs


class MidBlock(nnx.Module):
    """resnet, transformer, resnet at the coarsest level. The transformer always has self-attention."""

    def __init__(self, config: UNet2DConditionConfig, **kw: Unpack[LayerArgs]):
        config = dataclasses.replace(config, only_cross_attention=False)
        level, width = len(config.block_out_channels) - 1, config.block_out_channels[-1]
        first = Block(config, level, [(width, width)], cross=True, **kw)
        last = Block(config, level, [(width, width)], cross=False, **kw)
        self.resnets = nnx.List([*first.resnets, *last.resnets])
        self.attentions = first.attentions

    def __call__(self, x: Array, temb: Array, context: Array) -> Array:
        x = self.attentions[0](self.resnets[0](x, temb), context)
        return self.resnets[1](x, temb)


class UpBlock(Block):
    """A level on the way up: each layer also reads what the way down left at this size."""

    def __init__(self, config: UNet2DConditionConfig, level: int, *, cross: bool, **kw: Unpack[LayerArgs]):
        channels = config.block_out_channels
        below, cout, above = (channels[min(max(i, 0), len(channels) - 1)] for i in (level + 1, level, level - 1))
        layers = at(config.layers_per_block, level) + 1
        widths = [((below if i == 0 else cout) + (above if i == layers - 1 else cout), cout) for i in range(layers)]
        super().__init__(config, level, widths, cross=cross, **kw)
        self.upsamplers = nnx.List([Upsample(cout, **kw)] if level else [])

    def __call__(self, x: Array, skips: list[Array], temb: Array, context: Array) -> Array:
        for i in range(len(self.resnets)):
            x = self.layer(i, jnp.concatenate([x, skips.pop()], axis=-1), temb, context)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[1:3])
        return x


class UNet2DConditionModel(Model):
    """[B h w Cin] noisy latents, [B] timesteps, [B L D] text states -> [B h w Cout] prediction

    Any h and w; a timestep per image, not necessarily whole.
    """

    config_class = UNet2DConditionConfig

    def __init__(self, config: UNet2DConditionConfig, **kw: Unpack[LayerArgs]):
        self.config = config
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = conv(config.in_channels, widths[0], 3, **kw)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0], **kw)
        self.down_blocks = nnx.List(
            DownBlock(config, level, cross=kind == "CrossAttnDownBlock2D", **kw)
            for level, kind in enumerate(config.down_block_types)
        )
        self.mid_block = MidBlock(config, **kw)
        self.up_blocks = nnx.List(
            UpBlock(config, len(widths) - 1 - i, cross=kind == "CrossAttnUpBlock2D", **kw)
            for i, kind in enumerate(config.up_block_types)
        )
        self.conv_norm_out = GroupNorm(widths[0], groups=groups, eps=config.norm_eps, **kw)
        self.conv_out = conv(widths[0], config.out_channels, 3, **kw)

    def __call__(self, sample: Array, timesteps: Array, encoder_hidden_states: Array) -> Array:
        config, context = self.config, encoder_hidden_states
        t = timestep_embedding(
            jnp.broadcast_to(timesteps, sample.shape[:1]),
            config.block_out_channels[0],
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        )
        temb = self.time_embedding(t)
        skips = [self.conv_in(sample)]
        for block in self.down_blocks:
            skips += block(skips[-1], temb, context)
        x = self.mid_block(skips[-1], temb, context)
        for block in self.up_blocks:
            x = block(x, skips, temb, context)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))
