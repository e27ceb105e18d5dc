"""The conditional UNet of latent diffusion (arXiv:2112.10752): predicts noise, velocity or the clean latents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple, Unpack

import jax.numpy as jnp
from flax import nnx
from jax import Array

from sdjax.checkpoints.errors import CheckpointError
from sdjax.fields import Channels, Levels, Within
from sdjax.models.attention import BasicTransformerBlock, Context, Pictures
from sdjax.models.freeu import BLOCKS
from sdjax.models.layers import GroupNorm, LayerArgs, TimestepEmbedding, added, conv, embedding
from sdjax.models.unet_blocks import Freed, UpBlock, at
from sdjax.models.unet_encoder import Added, Depth, Depths, Encoder, EncoderConfig, Size, Waves
from sdjax.ops.activations import silu

PARTS = ("down_blocks", "up_blocks", "mid_block")
PROJECTION = "projection"


@dataclass(frozen=True)
class UNet2DConditionConfig(EncoderConfig):
    """The fields of a diffusers `unet/config.json`, with its defaults.

    `sample_size` is the side of the latents, or their height and width. `time_cond_proj_dim` (LCM, arXiv:2310.04378,
    section 4.2) conditions on an embedding of the guidance scale. On the way up, the depths of a level's transformers
    are those of `reverse_transformer_layers_per_block`, the coarsest level first, if it is given (SSD-1B,
    arXiv:2401.02677).
    `num_class_embeds` conditions on the number of a class, or of a noise level, by a table of embeddings;
    `class_embed_type="timestep"` in its place on the embedding of a number, "projection" on a vector of
    `projection_class_embeddings_input_dim` channels.
    """

    sample_size: Size | tuple[Size, Size] | None = None
    out_channels: Channels = 4
    up_block_types: Annotated[tuple[str, ...], Levels] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    reverse_transformer_layers_per_block: tuple[Depth | Depths, ...] | None = None
    time_cond_proj_dim: Waves | None = None
    class_embed_type: str | None = None
    num_class_embeds: Annotated[int, Within(1, 2**16)] | None = None

    neutral: ClassVar = {
        **EncoderConfig.neutral,
        "up_block_types": {"CrossAttnUpBlock2D", "UpBlock2D"},
        "class_embed_type": {None, "timestep", PROJECTION},
    }
    unsupported: ClassVar = {
        **EncoderConfig.unsupported,
        "attention_type": "default",
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "resnet_out_scale_factor": 1,
        "time_embedding_type": "positional",
    }
    per_level: ClassVar = (*EncoderConfig.per_level, "up_block_types", "reverse_transformer_layers_per_block")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.takes_vector and self.projection_class_embeddings_input_dim is None:
            raise CheckpointError(
                f"{type(self).__name__}: class_embed_type={PROJECTION!r} without projection_class_embeddings_input_dim"
            )

    @property
    def predicted_channels(self) -> int:
        """Of what is predicted."""
        return self.out_channels

    @property
    def takes_vector(self) -> bool:
        """Whether `class_labels` are vectors."""
        return self.class_embed_type == PROJECTION

    @property
    def takes_number(self) -> bool:
        """Whether `class_labels` are numbers."""
        return not self.takes_vector and (self.class_embed_type or self.num_class_embeds) is not None

    def up_depths(self, level: int) -> int | tuple[int, ...]:
        """Blocks in each transformer of a level on the way up."""
        upwards = self.reverse_transformer_layers_per_block
        return upwards[-1 - level] if upwards else self.down_depths(level)

    def _kinds(self) -> list[list[str]]:
        return [[*own, up] for own, up in zip(super()._kinds(), reversed(self.up_block_types), strict=True)]

    def _count_blocks(self) -> int:
        upwards = self.levels[::-1]
        layers = [at(self.layers_per_block, level) + 1 for level in upwards]
        depths = [self.up_depths(level) for level in upwards]
        return super()._count_blocks() + self.blocks_of(self.up_block_types, depths, layers)


class DeepFeatures(NamedTuple):
    """What the last layer of the finest level reads beside the sample."""

    x: Array
    """[B h w C] of all the layers before it"""
    residual: Array | None
    """[B h w C] what is added to what the first convolution gives; None: nothing"""


class UNet2DConditionModel(Encoder):
    """[B h w Cin] noisy latents, [B] timesteps, [B L D] text states -> [B h w Cout] prediction

    Any h and w; a timestep per image, not necessarily whole. With k times as many text states (and all that follows
    them) there are k predictions of each image, B after B, and what they have in common, all before the first
    cross-attention, is computed once. Depending on the config there are further conditions, see `Added`, and
    class_labels, [B] numbers of classes or noise levels, or [B D] vectors. Raises ValueError naming the argument that
    is missing, that the model does not take, or that has another size.

    pictures: what cross-attentions attend to beside the text states, by its transformer blocks' names.
    perturbed: by a transformer block's name, [B] 1 where its pixels attend to themselves alone (PAG, arXiv:2403.17377).
    freeu [B 4]: s1, s2, b1, b2 of the two coarsest levels on the way up (FreeU, see `freeu.freeu`).
    residuals [B ...]: what is added to what each layer on the way down leaves for the way up, and at last to what comes
    out of the middle (ControlNet, arXiv:2302.05543).
    features [B ...]: what is added in each level on the way down, see `Encoder.encode` (T2I-Adapter, arXiv:2302.08453).
    deep: what `deep_features` gave for an earlier sample, in place of most of the network (DeepCache, arXiv:2312.00858,
    section 3.2): `unet(x, ..., deep=unet.deep_features(x, ..., residuals, features))` is `unet(x, ..., residuals,
    features)`.
    """

    config_class = UNet2DConditionConfig

    def __init__(self, config: UNet2DConditionConfig, **kw: Unpack[LayerArgs]):
        super().__init__(config, cond_channels=config.time_cond_proj_dim, **kw)
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.up_blocks = nnx.List(
            UpBlock(config, len(widths) - 1 - i, cross=kind == "CrossAttnUpBlock2D", **kw)
            for i, kind in enumerate(config.up_block_types)
        )
        self.class_embedding = _class_embedding(config, **kw)
        self.conv_norm_out = GroupNorm(widths[0], groups=groups, eps=config.norm_eps, **kw)
        self.conv_out = conv(widths[0], config.out_channels, 3, **kw)
        for name, block in self.transformer_blocks().items():
            block.name = name

    def transformer_blocks(self) -> dict[str, BasicTransformerBlock]:
        """By name, in the order of PyTorch: those on the way down, on the way up, in the middle."""
        found = {path: part for path, part in nnx.iter_graph(self) if isinstance(part, BasicTransformerBlock)}
        order = sorted(found, key=lambda path: (PARTS.index(path[0]), path))
        return {".".join(map(str, path)): found[path] for path in order}

    def __call__(
        self,
        sample: Array,
        timesteps: Array,
        encoder_hidden_states: Array,
        *,
        pictures: Pictures | None = None,
        perturbed: Mapping[str, Array] | None = None,
        freeu: Array | None = None,
        residuals: Sequence[Array] = (),
        features: Sequence[Array] = (),
        deep: DeepFeatures | None = None,
        **conditions: Unpack[Added],
    ) -> Array:
        context, skip = Context(encoder_hidden_states, pictures, perturbed), self.conv_in(sample)
        temb = self.embed(sample, timesteps, **conditions)
        deep = self._deep(skip, temb, context, freeu, residuals, features) if deep is None else deep
        skip = skip if deep.residual is None else added(skip, deep.residual)
        last = self.up_blocks[-1]
        x = last.joined(len(last.resnets) - 1, deep.x, skip, temb, context, _freed(len(self.up_blocks) - 1, freeu))
        return self.conv_out(silu(self.conv_norm_out(x)))

    def deep_features(
        self,
        sample: Array,
        timesteps: Array,
        encoder_hidden_states: Array,
        *,
        pictures: Pictures | None = None,
        perturbed: Mapping[str, Array] | None = None,
        freeu: Array | None = None,
        residuals: Sequence[Array] = (),
        features: Sequence[Array] = (),
        **conditions: Unpack[Added],
    ) -> DeepFeatures:
        """What the last layer of the finest level reads beside the sample: of all the layers before it.

        Close to the same for samples of neighbouring timesteps. Arguments and errors as of a call.
        """
        temb = self.embed(sample, timesteps, **conditions)
        context = Context(encoder_hidden_states, pictures, perturbed)
        return self._deep(self.conv_in(sample), temb, context, freeu, residuals, features)

    def embed(
        self, sample: Array, timesteps: Array, *, class_labels: Array | None = None, **conditions: Unpack[Added]
    ) -> Array:
        """As `Encoder.embed`, with the embedding of the class_labels."""
        temb = super().embed(sample, timesteps, **conditions)
        if (class_labels is None) != (self.class_embedding is None):
            raise ValueError(f"class_labels: this model {'needs' if class_labels is None else 'does not take'} it")
        if class_labels is None:
            return temb
        if self.config.class_embed_type is None:
            return added(temb, self.class_embedding(class_labels.astype(jnp.int32)))
        if not self.config.takes_vector:
            class_labels = self.waves(class_labels, self.config.block_out_channels[0])
        elif (channels := class_labels.shape[-1]) != (expected := self.config.projection_class_embeddings_input_dim):
            raise ValueError(f"class_labels of {channels} channels; this model takes {expected}")
        return added(temb, self.class_embedding(class_labels))

    def _deep(
        self,
        x: Array,
        temb: Array,
        context: Context,
        freeu: Array | None,
        residuals: Sequence[Array],
        features: Sequence[Array],
    ) -> DeepFeatures:
        skips, x = self.encode(x, temb, context, features)
        if residuals:
            *skips, x = (added(own, more) for own, more in zip([*skips, x], residuals, strict=True))
        *blocks, last = self.up_blocks
        for i, block in enumerate(blocks):
            x = block(x, skips, temb, context, freed=_freed(i, freeu))
        x = last(x, skips, temb, context, layers=len(last.resnets) - 1, freed=_freed(len(blocks), freeu))
        return DeepFeatures(x, residuals[0] if residuals else None)


def _class_embedding(config: UNet2DConditionConfig, **kw: Unpack[LayerArgs]) -> nnx.Module | None:
    """[B] numbers, their [B C] sinusoidal embeddings or [B D] vectors -> [B T]; None: the model takes none of these."""
    width = config.block_out_channels[0]
    if config.takes_vector:
        return TimestepEmbedding(config.projection_class_embeddings_input_dim, 4 * width, **kw)
    if config.class_embed_type is not None:
        return TimestepEmbedding(width, 4 * width, **kw)
    return embedding(config.num_class_embeds, 4 * width, **kw) if config.takes_number else None


def _freed(block: int, freeu: Array | None) -> Freed:
    """b and s of a block on the way up, the coarsest 0."""
    return None if freeu is None or block >= BLOCKS else (freeu[:, BLOCKS + block], freeu[:, block])
