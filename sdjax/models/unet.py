"""The conditional UNet of latent diffusion (arXiv:2112.10752): predicts noise, velocity or the clean latents."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Unpack

import jax.numpy as jnp
from flax import nnx
from jax import Array

from sdjax.checkpoints.errors import CheckpointError
from sdjax.fields import Channels, Epsilon, Levels, Within
from sdjax.models.attention import Transformer2DModel
from sdjax.models.base import Model, ModelConfig
from sdjax.models.layers import (
    Downsample,
    GroupNorm,
    LayerArgs,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    added,
    conv,
    repeated,
    timestep_embedding,
)
from sdjax.ops.activations import silu

Size = Annotated[int, Within(1, 1024)]
Layers = Annotated[int, Within(1, 8)]
Depth = Annotated[int, Within(0, 64)]
Depths = Annotated[tuple[Depth, ...], Within(1, 9)]
Waves = Annotated[int, Within(4, 2**16)]
"""Channels of which half are frequencies"""
MOST_BLOCKS = 160  # SDXL has 70


@dataclass(frozen=True)
class UNet2DConditionConfig(ModelConfig):
    """The fields of a diffusers `unet/config.json`, with its defaults.

    `sample_size` is the side of the latents, or their height and width.
    `attention_head_dim` is, in every published checkpoint, the number of heads (an old misnomer).
    `addition_embed_type="text_time"` (SDXL, arXiv:2307.01952, section 2.2) conditions on a pooled text state and on
    time ids, `time_cond_proj_dim` (LCM, arXiv:2310.04378, section 4.2) on an embedding of the guidance scale.
    The depths of a level's transformers are one number or one for each of them, on the way up those of
    `reverse_transformer_layers_per_block`, the coarsest level first, if it is given (SSD-1B, arXiv:2401.02677).
    `mid_block_type` may be without attention, or None: without a middle (BK-SDM, arXiv:2305.15798; KOALA).
    """

    sample_size: Size | tuple[Size, Size] | None = None
    in_channels: Channels = 4
    out_channels: Channels = 4
    flip_sin_to_cos: bool = True
    freq_shift: Annotated[float, Within(0, 1)] = 0
    down_block_types: Annotated[tuple[str, ...], Levels] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: Annotated[tuple[str, ...], Levels] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: Annotated[tuple[Waves, ...], Levels] = (320, 640, 1280, 1280)
    layers_per_block: Layers | tuple[Layers, ...] = 2
    act_fn: str = "silu"
    norm_num_groups: Channels = 32
    norm_eps: Epsilon = 1e-5
    cross_attention_dim: Channels | tuple[Channels, ...] = 1280
    transformer_layers_per_block: Depth | tuple[Depth | Depths, ...] = 1
    reverse_transformer_layers_per_block: tuple[Depth | Depths, ...] | None = None
    attention_head_dim: Channels | tuple[Channels, ...] = 8
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: Waves | None = None
    projection_class_embeddings_input_dim: Channels | None = None
    time_cond_proj_dim: Waves | None = None

    neutral: ClassVar = {
        "down_block_types": {"CrossAttnDownBlock2D", "DownBlock2D"},
        "mid_block_type": {"UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None},
        "up_block_types": {"CrossAttnUpBlock2D", "UpBlock2D"},
        "act_fn": {"silu", "swish"},
        "addition_embed_type": {None, "text_time"},
    }
    unsupported: ClassVar = {
        "addition_embed_type_num_heads": 64,
        "attention_type": "default",
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "downsample_padding": 1,
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
        "reverse_transformer_layers_per_block",
        "attention_head_dim",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        needed = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
        if self.addition_embed_type and (missing := [k for k in needed if not getattr(self, k)]):
            kind = f"addition_embed_type={self.addition_embed_type!r}"
            raise CheckpointError(f"{type(self).__name__}: {kind} without {' and '.join(missing)}")
        levels = range(len(self.block_out_channels))
        layers = [at(self.layers_per_block, level) for level in levels]
        down, up = ([depths(level) for level in levels] for depths in (self.down_depths, self.up_depths))
        blocks = self._blocks(self.down_block_types, down, layers)
        blocks += self._blocks(self.up_block_types, up[::-1], [n + 1 for n in reversed(layers)])
        if blocks > MOST_BLOCKS:
            raise CheckpointError(f"{type(self).__name__}: {blocks} transformer blocks, more than {MOST_BLOCKS}")
        if isinstance(self.cross_attention_dim, tuple) and len({*self.cross_attention_dim}) > 1:
            raise CheckpointError(f"{type(self).__name__}: not one cross_attention_dim: {self.cross_attention_dim}")
        self.check_divides("norm_num_groups", self.norm_num_groups, self.block_out_channels)
        for level, kinds in enumerate(zip(self.down_block_types, reversed(self.up_block_types), strict=True)):
            if any("CrossAttn" in kind for kind in (*kinds, *([self.mid_block_type or ""] * (level == levels[-1])))):
                self.check_divides(
                    "attention_head_dim", at(self.attention_head_dim, level), (self.block_out_channels[level],)
                )

    def _blocks(self, kinds: tuple[str, ...], depths: list, layers: list[int]) -> int:
        """How many blocks the transformers of these levels have."""
        blocks = 0
        for kind, depth, n in zip(kinds, depths, layers, strict=True):
            if "CrossAttn" not in kind:
                continue
            if isinstance(depth, tuple) and len(depth) != n:
                raise CheckpointError(
                    f"{type(self).__name__}: a {kind} of {n} layers with transformer depths {depth}: see "
                    "transformer_layers_per_block and reverse_transformer_layers_per_block"
                )
            blocks += sum(depth) if isinstance(depth, tuple) else n * depth
        return blocks

    def down_depths(self, level: int) -> int | tuple[int, ...]:
        """Blocks in each transformer of a level on the way down; level 0 is the finest."""
        return at(self.transformer_layers_per_block, level)

    def up_depths(self, level: int) -> int | tuple[int, ...]:
        """Blocks in each transformer of a level on the way up."""
        upwards = self.reverse_transformer_layers_per_block
        return upwards[-1 - level] if upwards else self.down_depths(level)

    def time_ids(self, pooled_channels: int) -> int:
        """How many time ids a "text_time" model takes beside a pooled text state of that many channels."""
        return (self.projection_class_embeddings_input_dim - pooled_channels) // self.addition_time_embed_dim


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
        config: UNet2DConditionConfig,
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
        super().__init__(config, level, widths, depths=config.down_depths(level) if cross else None, **kw)
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
    """resnet, transformer, resnet at the coarsest level, or one resnet alone.

    The transformer always has self-attention, and is as deep as the first one of that level.
    """

    def __init__(self, config: UNet2DConditionConfig, **kw: Unpack[LayerArgs]):
        config = dataclasses.replace(config, only_cross_attention=False)
        level, width = len(config.block_out_channels) - 1, config.block_out_channels[-1]
        cross = config.mid_block_type == "UNetMidBlock2DCrossAttn"
        first = Block(config, level, [(width, width)], depths=at(config.down_depths(level), 0) if cross else None, **kw)
        last = Block(config, level, [(width, width)] if cross else [], depths=None, **kw)
        self.resnets = nnx.List([*first.resnets, *last.resnets])
        self.attentions = first.attentions

    def __call__(self, x: Array, temb: Array, context: Array) -> Array:
        x = self.resnets[0](x, temb)
        for transformer, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            x = resnet(transformer(x, context), temb)
        return x


class UpBlock(Block):
    """A level on the way up: each layer also reads what the way down left at this size, the last first."""

    def __init__(self, config: UNet2DConditionConfig, level: int, *, cross: bool, **kw: Unpack[LayerArgs]):
        channels = config.block_out_channels
        below, cout, above = (channels[min(max(i, 0), len(channels) - 1)] for i in (level + 1, level, level - 1))
        layers = at(config.layers_per_block, level) + 1
        widths = [((below if i == 0 else cout) + (above if i == layers - 1 else cout), cout) for i in range(layers)]
        super().__init__(config, level, widths, depths=config.up_depths(level) if cross else None, **kw)
        self.upsamplers = nnx.List([Upsample(cout, **kw)] if level else [])

    def __call__(self, x: Array, skips: list[Array], temb: Array, context: Array, layers: int | None = None) -> Array:
        """layers: how many of them, None: all."""
        for i in range(len(self.resnets) if layers is None else layers):
            x = self.layer(i, beside(x, skips.pop()), temb, context)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[1:3])
        return x


def beside(x: Array, skip: Array) -> Array:
    """The channels of both: [k B H W C], [B H W D] -> [k B H W C+D]"""
    return jnp.concatenate([repeated(x, skip), repeated(skip, x)], axis=-1)


class UNet2DConditionModel(Model):
    """[B h w Cin] noisy latents, [B] timesteps, [B L D] text states -> [B h w Cout] prediction

    Any h and w; a timestep per image, not necessarily whole. With k times as many text states (and text_embeds,
    time_ids, deep) there are k predictions of each image, B after B, and what they have in common, all before the first
    cross-attention, is computed once. Depending on the config there are further conditions:
    text_embeds [B P], the pooled text state, and time_ids [B N] ("text_time": heights, widths, crops, a score);
    timestep_cond [B T], the embedded guidance scale (`time_cond_proj_dim`). Raises ValueError naming the argument that
    is missing, that the model does not take, or that has another size.

    deep [B h w C]: what `deep_features` gave for an earlier sample, in place of most of the network (DeepCache,
    arXiv:2312.00858, section 3.2): `unet(x, ..., deep=unet.deep_features(x, ...))` is `unet(x, ...)`.
    """

    config_class = UNet2DConditionConfig

    def __init__(self, config: UNet2DConditionConfig, **kw: Unpack[LayerArgs]):
        self.config = config
        widths, groups = config.block_out_channels, config.norm_num_groups
        temb, added = 4 * widths[0], config.projection_class_embeddings_input_dim
        self.conv_in = conv(config.in_channels, widths[0], 3, **kw)
        self.time_embedding = TimestepEmbedding(widths[0], temb, cond_channels=config.time_cond_proj_dim, **kw)
        self.add_embedding = TimestepEmbedding(added, temb, **kw) if config.addition_embed_type else None
        self.down_blocks = nnx.List(
            DownBlock(config, level, cross=kind == "CrossAttnDownBlock2D", **kw)
            for level, kind in enumerate(config.down_block_types)
        )
        self.mid_block = MidBlock(config, **kw) if config.mid_block_type else None
        self.up_blocks = nnx.List(
            UpBlock(config, len(widths) - 1 - i, cross=kind == "CrossAttnUpBlock2D", **kw)
            for i, kind in enumerate(config.up_block_types)
        )
        self.conv_norm_out = GroupNorm(widths[0], groups=groups, eps=config.norm_eps, **kw)
        self.conv_out = conv(widths[0], config.out_channels, 3, **kw)

    def __call__(
        self,
        sample: Array,
        timesteps: Array,
        encoder_hidden_states: Array,
        text_embeds: Array | None = None,
        time_ids: Array | None = None,
        timestep_cond: Array | None = None,
        deep: Array | None = None,
    ) -> Array:
        context, skip = encoder_hidden_states, self.conv_in(sample)
        temb = self._temb(sample, timesteps, text_embeds, time_ids, timestep_cond)
        deep = self._deep(skip, temb, context) if deep is None else deep
        last = self.up_blocks[-1]
        x = last.layer(len(last.resnets) - 1, beside(deep, skip), temb, context)
        return self.conv_out(silu(self.conv_norm_out(x)))

    def deep_features(
        self,
        sample: Array,
        timesteps: Array,
        encoder_hidden_states: Array,
        text_embeds: Array | None = None,
        time_ids: Array | None = None,
        timestep_cond: Array | None = None,
    ) -> Array:
        """What the last layer of the finest level reads of all the layers before it: [B h w C]

        Close to the same for samples of neighbouring timesteps. Arguments and errors as of a call.
        """
        temb = self._temb(sample, timesteps, text_embeds, time_ids, timestep_cond)
        return self._deep(self.conv_in(sample), temb, encoder_hidden_states)

    def _deep(self, x: Array, temb: Array, context: Array) -> Array:
        skips = [x]
        for block in self.down_blocks:
            skips += block(skips[-1], temb, context)
        x = skips[-1] if self.mid_block is None else self.mid_block(skips[-1], temb, context)
        *blocks, last = self.up_blocks
        for block in blocks:
            x = block(x, skips, temb, context)
        return last(x, skips, temb, context, layers=len(last.resnets) - 1)

    def _temb(
        self,
        sample: Array,
        timesteps: Array,
        text_embeds: Array | None,
        time_ids: Array | None,
        timestep_cond: Array | None,
    ) -> Array:
        """The embedding of everything but the sample and the text states: [B T]"""
        self._check_conditions(text_embeds, time_ids, timestep_cond)
        widths = self.config.block_out_channels
        temb = self.time_embedding(self._waves(jnp.broadcast_to(timesteps, sample.shape[:1]), widths[0]), timestep_cond)
        if self.add_embedding is not None:
            waves = self._waves(time_ids.reshape(-1), self.config.addition_time_embed_dim)  # [B N] -> [B*N A]
            temb = added(
                temb, self.add_embedding(jnp.concatenate([text_embeds, waves.reshape(len(time_ids), -1)], axis=-1))
            )
        return temb

    def _waves(self, t: Array, channels: int) -> Array:
        """[N] -> [N channels]"""
        flip, shift = self.config.flip_sin_to_cos, self.config.freq_shift
        return timestep_embedding(t, channels, flip_sin_to_cos=flip, freq_shift=shift)

    def _check_conditions(self, text_embeds: Array | None, time_ids: Array | None, timestep_cond: Array | None) -> None:
        config = self.config
        for name, value, wanted in (
            ("text_embeds", text_embeds, config.addition_embed_type),
            ("time_ids", time_ids, config.addition_embed_type),
            ("timestep_cond", timestep_cond, config.time_cond_proj_dim),
        ):
            if (value is None) == bool(wanted):
                raise ValueError(f"{name}: this model {'needs' if wanted else 'does not take'} it")
        if config.addition_embed_type:
            channels = text_embeds.shape[-1] + time_ids.shape[-1] * config.addition_time_embed_dim
            if channels != (expected := config.projection_class_embeddings_input_dim):
                raise ValueError(
                    f"text_embeds of {text_embeds.shape[-1]} channels and {time_ids.shape[-1]} time_ids of "
                    f"{config.addition_time_embed_dim} make {channels} channels; this model takes {expected}"
                )
