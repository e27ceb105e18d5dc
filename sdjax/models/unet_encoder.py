"""The half of the UNet on the way down, which a ControlNet is made of as well."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, TypedDict, Unpack

import jax.numpy as jnp
from flax import nnx
from jax import Array

from sdjax.checkpoints.errors import CheckpointError
from sdjax.fields import Channels, Epsilon, Levels, Within
from sdjax.models.attention import Context
from sdjax.models.base import Model, ModelConfig
from sdjax.models.layers import LayerArgs, TimestepEmbedding, added, conv, timestep_embedding
from sdjax.models.unet_blocks import DownBlock, MidBlock, at

Size = Annotated[int, Within(1, 1024)]
Layers = Annotated[int, Within(1, 8)]
Depth = Annotated[int, Within(0, 64)]
Depths = Annotated[tuple[Depth, ...], Within(1, 9)]
Waves = Annotated[int, Within(4, 2**16)]
"""Channels of which half are frequencies"""
MOST_BLOCKS = 160  # of transformers; SDXL has 70


@dataclass(frozen=True)
class EncoderConfig(ModelConfig):
    """The fields of a `config.json` that the half on the way down depends on, with diffusers' defaults.

    `attention_head_dim` is, in every published checkpoint, the number of heads (an old misnomer).
    `addition_embed_type="text_time"` (SDXL, arXiv:2307.01952, section 2.2) conditions on a pooled text state and on
    time ids. The depths of a level's transformers are one number or one for each of them.
    `mid_block_type` may be without attention, or None: without a middle (BK-SDM, arXiv:2305.15798; KOALA).
    """

    in_channels: Channels = 4
    flip_sin_to_cos: bool = True
    freq_shift: Annotated[float, Within(0, 1)] = 0
    down_block_types: Annotated[tuple[str, ...], Levels] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: Annotated[tuple[Waves, ...], Levels] = (320, 640, 1280, 1280)
    layers_per_block: Layers | tuple[Layers, ...] = 2
    act_fn: str = "silu"
    norm_num_groups: Channels = 32
    norm_eps: Epsilon = 1e-5
    cross_attention_dim: Channels | tuple[Channels, ...] = 1280
    transformer_layers_per_block: Depth | tuple[Depth | Depths, ...] = 1
    attention_head_dim: Channels | tuple[Channels, ...] = 8
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: Waves | None = None
    projection_class_embeddings_input_dim: Channels | None = None

    neutral: ClassVar = {
        "down_block_types": {"CrossAttnDownBlock2D", "DownBlock2D"},
        "mid_block_type": {"UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None},
        "act_fn": {"silu", "swish"},
        "addition_embed_type": {None, "text_time"},
    }
    unsupported: ClassVar = {
        "addition_embed_type_num_heads": 64,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "resnet_time_scale_shift": "default",
        "upcast_attention": True,  # scores and softmax always are float32
    }
    per_level: ClassVar = (
        "block_out_channels",
        "down_block_types",
        "only_cross_attention",
        "layers_per_block",
        "cross_attention_dim",
        "transformer_layers_per_block",
        "attention_head_dim",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        needed = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
        if self.addition_embed_type and (missing := [k for k in needed if not getattr(self, k)]):
            kind = f"addition_embed_type={self.addition_embed_type!r}"
            raise CheckpointError(f"{type(self).__name__}: {kind} without {' and '.join(missing)}")
        if (blocks := self._count_blocks()) > MOST_BLOCKS:
            raise CheckpointError(f"{type(self).__name__}: {blocks} transformer blocks, more than {MOST_BLOCKS}")
        if isinstance(self.cross_attention_dim, tuple) and len({*self.cross_attention_dim}) > 1:
            raise CheckpointError(f"{type(self).__name__}: not one cross_attention_dim: {self.cross_attention_dim}")
        self.check_divides("norm_num_groups", self.norm_num_groups, self.block_out_channels)
        for level, kinds in enumerate(self._kinds()):
            if any("CrossAttn" in kind for kind in kinds):
                self.check_divides(
                    "attention_head_dim", at(self.attention_head_dim, level), (self.block_out_channels[level],)
                )

    @property
    def levels(self) -> range:
        """Of resolution; 0 is the finest."""
        return range(len(self.block_out_channels))

    def features(self, factor: int) -> tuple[tuple[int, int], ...]:
        """(channels, pixels on a side for each of its own) of what can be added in each level on the way down, where
        the latents have `factor` pixels."""
        last = self.levels[-1]
        halvings = [
            level + (kind == "DownBlock2D" and level < last)
            for level, kind in zip(self.levels, self.down_block_types, strict=True)
        ]
        return tuple((width, factor * 2**n) for width, n in zip(self.block_out_channels, halvings, strict=True))

    def down_depths(self, level: int) -> int | tuple[int, ...]:
        """Blocks in each transformer of a level on the way down."""
        return at(self.transformer_layers_per_block, level)

    def time_ids(self, pooled_channels: int) -> int:
        """How many time ids a "text_time" model takes beside a pooled text state of that many channels."""
        return (self.projection_class_embeddings_input_dim - pooled_channels) // self.addition_time_embed_dim

    def _kinds(self) -> list[list[str]]:
        """The kinds of blocks of each level."""
        middle = [[] for _ in self.levels[:-1]] + [[self.mid_block_type or ""]]
        return [[kind, *own] for kind, own in zip(self.down_block_types, middle, strict=True)]

    def _count_blocks(self) -> int:
        layers = [at(self.layers_per_block, level) for level in self.levels]
        return self.blocks_of(self.down_block_types, [self.down_depths(level) for level in self.levels], layers)

    def blocks_of(self, kinds: tuple[str, ...], depths: list, layers: list[int]) -> int:
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


class Added(TypedDict, total=False):
    """What a model is conditioned on beside the timestep and the text states; which of these, its config says."""

    text_embeds: Array
    """[B P] the pooled text state ("text_time")"""
    time_ids: Array
    """[B N] heights, widths, crops, a score ("text_time")"""
    timestep_cond: Array
    """[B T] the embedded guidance scale (`time_cond_proj_dim`)"""


class Encoder(Model):
    """The first convolution, the embeddings of timestep and conditions, the levels on the way down and the middle."""

    def __init__(self, config: EncoderConfig, *, cond_channels: int | None = None, **kw: Unpack[LayerArgs]):
        self.config = config
        width, added = config.block_out_channels[0], config.projection_class_embeddings_input_dim
        self.conv_in = conv(config.in_channels, width, 3, **kw)
        self.time_embedding = TimestepEmbedding(width, 4 * width, cond_channels=cond_channels, **kw)
        self.add_embedding = TimestepEmbedding(added, 4 * width, **kw) if config.addition_embed_type else None
        self.down_blocks = nnx.List(
            DownBlock(config, level, cross=kind == "CrossAttnDownBlock2D", **kw)
            for level, kind in enumerate(config.down_block_types)
        )
        self.mid_block = MidBlock(config, **kw) if config.mid_block_type else None

    def encode(
        self, x: Array, temb: Array, context: Context, features: Sequence[Array] = ()
    ) -> tuple[list[Array], Array]:
        """What the way down leaves for the way up, the finest first, and what comes out of the middle.

        features [B ...]: what is added in each level; one more, to the middle's where the shapes agree.
        """
        skips = [x]
        for block, feature in itertools.zip_longest(self.down_blocks, features[: len(self.down_blocks)]):
            skips += block(skips[-1], temb, context, feature)
        if self.mid_block is None:
            return skips, skips[-1]
        x = self.mid_block(skips[-1], temb, context)
        for feature in features[len(self.down_blocks) :][:1]:
            x = added(x, feature) if feature.shape[1:] == x.shape[1:] else x
        return skips, x

    def embed(self, sample: Array, timesteps: Array, **conditions: Unpack[Added]) -> Array:
        """The embedding of everything but the sample and the text states: [B T]"""
        self._check(conditions)
        width = self.config.block_out_channels[0]
        waves = self.waves(jnp.broadcast_to(timesteps, sample.shape[:1]), width)
        temb = self.time_embedding(waves, conditions.get("timestep_cond"))
        if self.add_embedding is not None:
            text_embeds, time_ids = conditions["text_embeds"], conditions["time_ids"]
            waves = self.waves(time_ids.reshape(-1), self.config.addition_time_embed_dim)  # [B N] -> [B*N A]
            temb = added(
                temb, self.add_embedding(jnp.concatenate([text_embeds, waves.reshape(len(time_ids), -1)], axis=-1))
            )
        return temb

    def waves(self, t: Array, channels: int) -> Array:
        """[N] -> [N channels]"""
        flip, shift = self.config.flip_sin_to_cos, self.config.freq_shift
        return timestep_embedding(t, channels, flip_sin_to_cos=flip, freq_shift=shift)

    def _check(self, conditions: Added) -> None:
        config = self.config
        wanted = dict.fromkeys(("text_embeds", "time_ids"), config.addition_embed_type)
        wanted["timestep_cond"] = self.time_embedding.cond_proj is not None
        for name in wanted | conditions:
            if (conditions.get(name) is not None) != bool(wanted.get(name)):
                raise ValueError(f"{name}: this model {'needs' if wanted.get(name) else 'does not take'} it")
        if config.addition_embed_type:
            text_embeds, time_ids = conditions["text_embeds"], conditions["time_ids"]
            channels = text_embeds.shape[-1] + time_ids.shape[-1] * config.addition_time_embed_dim
            if channels != (expected := config.projection_class_embeddings_input_dim):
                raise ValueError(
                    f"text_embeds of {text_embeds.shape[-1]} channels and {time_ids.shape[-1]} time_ids of "
                    f"{config.addition_time_embed_dim} make {channels} channels; this model takes {expected}"
                )
