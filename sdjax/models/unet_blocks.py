"""The blocks of the UNet and of what is made of its first half."""

import dataclasses
from typing import TYPE_CHECKING, Any, Unpack

import jax.numpy as jnp
from flax import nnx
from jax import Array

from sdjax.models.attention import Context, Transformer2DModel
from sdjax.models.freeu import freeu
from sdjax.models.layers import Downsample, LayerArgs, ResnetBlock, Upsample, repeated

if TYPE_CHECKING:
    from sdjax.models.unet import UNet2DConditionConfig
    from sdjax.models.unet_encoder import EncoderConfig


Freed = tuple[Array, Array] | None


def at(value: Any, level: int) -> Any:
    """A config value that is one for all levels (or layers) or one for each."""
    return value[level] if isinstance(value, tuple) else value


class Block(nnx.Module):
    """Residual blocks, each followed by a transformer: what all levels of the UNet share.

    widths: (channels in, channels out) of each residual block; level 0 is the finest. depths: blocks in each
    transformer, None: there are no transformers.
    """

    def __init__(
        self,
        config: "EncoderConfig",
        level: int,
        widths: list[tuple[int, int]],
        *,
        depths: int | tuple[int, ...] | None,
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
                layers=at(depths, i),
                groups=groups,
                use_linear_projection=config.use_linear_projection,
                only_cross_attention=at(config.only_cross_attention, level),
                **kw,
            )
            for i, (_, cout) in enumerate(widths)
            if depths is not None
        )

    def layer(self, i: int, x: Array, temb: Array, context: Context) -> Array:
        """The i-th residual block and the transformer after it, if there is one."""
        x = self.resnets[i](x, temb)
        return self.attentions[i](x, context) if self.attentions else x


class DownBlock(Block):
    """A level on the way down: returns what each of its layers gave, for the way up."""

    def __init__(self, config: "EncoderConfig", level: int, *, cross: bool, **kw: Unpack[LayerArgs]):
        channels = config.block_out_channels
        cin, cout = channels[max(level - 1, 0)], channels[level]
        widths = [(cin if i == 0 else cout, cout) for i in range(at(config.layers_per_block, level))]
        super().__init__(config, level, widths, depths=config.down_depths(level) if cross else None, **kw)
        last = level == len(channels) - 1
        self.downsamplers = nnx.List([] if last else [Downsample(cout, ((1, 1), (1, 1)), **kw)])

    def __call__(self, x: Array, temb: Array, context: Context) -> list[Array]:
        outputs = []
        for i in range(len(self.resnets)):
            outputs.append(x := self.layer(i, x, temb, context))
        for downsample in self.downsamplers:
            outputs.append(x := downsample(x))
        return outputs


class MidBlock(nnx.Module):
    """resnet, transformer, resnet at the coarsest level, or one resnet alone.

    The transformer always has self-attention, and is as deep as the first one of that level.
    """

    def __init__(self, config: "EncoderConfig", **kw: Unpack[LayerArgs]):
        config = dataclasses.replace(config, only_cross_attention=False)
        level, width = len(config.block_out_channels) - 1, config.block_out_channels[-1]
        cross = config.mid_block_type == "UNetMidBlock2DCrossAttn"
        first = Block(config, level, [(width, width)], depths=at(config.down_depths(level), 0) if cross else None, **kw)
        last = Block(config, level, [(width, width)] if cross else [], depths=None, **kw)
        self.resnets = nnx.List([*first.resnets, *last.resnets])
        self.attentions = first.attentions

    def __call__(self, x: Array, temb: Array, context: Context) -> Array:
        x = self.resnets[0](x, temb)
        for transformer, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            x = resnet(transformer(x, context), temb)
        return x


class UpBlock(Block):
    """A level on the way up: each layer also reads what the way down left at this size, the last first."""

    def __init__(self, config: "UNet2DConditionConfig", level: int, *, cross: bool, **kw: Unpack[LayerArgs]):
        channels = config.block_out_channels
        below, cout, above = (channels[min(max(i, 0), len(channels) - 1)] for i in (level + 1, level, level - 1))
        layers = at(config.layers_per_block, level) + 1
        widths = [((below if i == 0 else cout) + (above if i == layers - 1 else cout), cout) for i in range(layers)]
        super().__init__(config, level, widths, depths=config.up_depths(level) if cross else None, **kw)
        self.upsamplers = nnx.List([Upsample(cout, **kw)] if level else [])

    def __call__(
        self,
        x: Array,
        skips: list[Array],
        temb: Array,
        context: Context,
        layers: int | None = None,
        freed: Freed = None,
    ) -> Array:
        """layers: how many of them, None: all."""
        for i in range(len(self.resnets) if layers is None else layers):
            x = self.joined(i, x, skips.pop(), temb, context, freed)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[1:3])
        return x

    def joined(self, i: int, x: Array, skip: Array, temb: Array, context: Context, freed: Freed) -> Array:
        """The i-th layer, of what came up and of what the way down left. freed: b and s of FreeU, if it is applied."""
        x, skip = (x, skip) if freed is None else freeu(x, skip, *freed)
        return self.layer(i, beside(x, skip), temb, context)


def beside(x: Array, skip: Array) -> Array:
    """The channels of both: [k B H W C], [B H W D] -> [k B H W C+D]"""
    return jnp.concatenate([repeated(x, skip), repeated(skip, x)], axis=-1)
