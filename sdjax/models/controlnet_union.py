"""ControlNet-Union (github.com/xinsir6/ControlNetPlus): one ControlNet for pictures of several types at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, Unpack

import jax.numpy as jnp
from flax import nnx
from jax import Array

from sdjax.checkpoints.errors import CheckpointError
from sdjax.fields import Channels, Levels, Within
from sdjax.models.controlnet import ZEROS, ControlNetConfig, ControlNetModel
from sdjax.models.layers import LayerArgs, TimestepEmbedding, added, layer_norm, linear
from sdjax.models.unet_encoder import Added
from sdjax.ops.activations import quick_gelu
from sdjax.ops.product import product

Types = Annotated[int, Within(1, 64)]


@dataclass(frozen=True)
class ControlNetUnionConfig(ControlNetConfig):
    """The fields of a diffusers `config.json` of a ControlNetUnionModel, with its defaults.

    `num_control_type`: 6, or 8 of ProMax. The transformer's channels are those of the embedded pictures.
    """

    conditioning_embedding_out_channels: Annotated[tuple[Channels, ...], Levels] = (48, 96, 192, 384)
    num_control_type: Types = 6
    num_trans_channel: Channels = 320
    num_trans_head: Types = 8
    num_trans_layer: Annotated[int, Within(0, 16)] = 1
    num_proj_channel: Channels = 320

    neutral: ClassVar = {
        **ControlNetConfig.neutral,
        "controlnet_conditioning_channel_order": {"rgb"},
        "mid_block_type": {"UNetMidBlock2DCrossAttn"},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.addition_time_embed_dim is None:
            raise CheckpointError(f"{type(self).__name__}: without addition_time_embed_dim")
        widths = (self.num_trans_channel, self.num_proj_channel, self.block_out_channels[0])
        if len({*widths}) > 1:
            names = "num_trans_channel, num_proj_channel and the first of block_out_channels"
            raise CheckpointError(f"{type(self).__name__}: {names} are not one number: {widths}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as `config.json` spells them, where the middle has no type."""
        return {name: value for name, value in super().to_dict().items() if name != "mid_block_type"}


class Typed(NamedTuple):
    """The P pictures that it is shown."""

    pictures: tuple[Array, ...]
    """each [B h w C]: `ControlNetModel.embed_picture`"""
    modes: Array
    """[B P] int32 the type of each, 0 to num_control_type - 1"""


class TokenAttention(nnx.Module):
    """out_proj(v(x)) of one token: [... C] -> [... C]

    In PyTorch the attention runs over the images of a batch: over copies of one token, so that each gives itself alone.
    The queries and keys, two thirds of `in_proj`, change nothing.
    """

    def __init__(self, channels: int, **kw: Unpack[LayerArgs]):
        dtype = kw.get("param_dtype", jnp.float32)
        self.in_proj_weight = nnx.Param(jnp.zeros((3 * channels, channels), dtype))
        self.in_proj_bias = nnx.Param(jnp.zeros(3 * channels, dtype))
        self.out_proj = linear(channels, channels, **kw)

    def __call__(self, x: Array) -> Array:
        weight, bias = (jnp.split(own[...], 3)[2].astype(x.dtype) for own in (self.in_proj_weight, self.in_proj_bias))
        return self.out_proj(product(x, weight.T, bias))


class TokenMlp(nnx.Module):
    """c_proj(quick_gelu(c_fc(x))), four times as wide inside"""

    def __init__(self, channels: int, **kw: Unpack[LayerArgs]):
        self.c_fc, self.c_proj = linear(channels, 4 * channels, **kw), linear(4 * channels, channels, **kw)

    def __call__(self, x: Array) -> Array:
        return self.c_proj(quick_gelu(self.c_fc(x)))


class TokenBlock(nnx.Module):
    """x += attn(ln_1(x)); x += mlp(ln_2(x)): [... C] -> [... C]"""

    def __init__(self, channels: int, **kw: Unpack[LayerArgs]):
        self.ln_1, self.ln_2 = layer_norm(channels, **kw), layer_norm(channels, **kw)
        self.attn, self.mlp = TokenAttention(channels, **kw), TokenMlp(channels, **kw)

    def __call__(self, x: Array) -> Array:
        x += self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class ControlNetUnionModel(ControlNetModel):
    """A ControlNet whose picture [B h w C] is the sum of several, see `fused`, and that is told their types [B P]."""

    config_class = ControlNetUnionConfig

    def __init__(self, config: ControlNetUnionConfig, **kw: Unpack[LayerArgs]):
        super().__init__(config, **kw)
        width, types = config.num_trans_channel, config.num_control_type
        self.task_embedding = nnx.Param(jnp.zeros((types, width), kw.get("param_dtype", jnp.float32)))
        self.transformer_layes = nnx.List(TokenBlock(width, **kw) for _ in range(config.num_trans_layer))
        self.spatial_ch_projs = linear(width, config.num_proj_channel, **kw | ZEROS)
        waves = config.addition_time_embed_dim * types
        self.control_add_embedding = TimestepEmbedding(waves, 4 * config.block_out_channels[0], **kw)

    @classmethod
    def takes(cls, config: Mapping[str, Any]) -> bool:
        """By the number of types: published ones are called ControlNetModel."""
        return super().takes(config) or config.get("num_control_type") is not None

    @classmethod
    def _config(cls, values: Mapping[str, Any], source: str) -> ControlNetUnionConfig:
        """Published ones are called ControlNetModel."""
        return super()._config({**values, "_class_name": cls.__name__}, source)

    def fused(self, pictures: Sequence[Array], modes: Array, scales: Array) -> Array:
        """P of [B h w C], their types and scales [B P] -> sum_i s_i (picture_i + proj(blocks(token_i))): [B h w C]

        token_i = s_i (the mean of picture_i over height and width + the embedding of its type).
        """
        means = jnp.stack([jnp.mean(own, axis=(1, 2)) for own in pictures], axis=1)  # [B P C]
        scales = scales[..., None].astype(means.dtype)
        tokens = scales * (means + self.task_embedding[...][modes].astype(means.dtype))
        for block in self.transformer_layes:
            tokens = block(tokens)
        shifts = self.spatial_ch_projs(tokens)
        return sum(scales[:, i, None, None] * (own + shifts[:, i, None, None]) for i, own in enumerate(pictures))

    def __call__(
        self,
        sample: Array,
        timesteps: Array,
        encoder_hidden_states: Array,
        picture: Array,
        *,
        modes: Array,
        **conditions: Unpack[Added],
    ) -> list[Array]:
        temb = added(self.embed(sample, timesteps, **conditions), self._embedded(modes))
        return self.residuals(sample, temb, encoder_hidden_states, picture)

    def _embedded(self, modes: Array) -> Array:
        """The types [B P] that there are -> [B T]"""
        there = (modes[..., None] == jnp.arange(self.config.num_control_type)).any(axis=1)  # [B N]
        waves = self.waves(there.reshape(-1), self.config.addition_time_embed_dim)
        return self.control_add_embedding(waves.reshape(len(modes), -1))
