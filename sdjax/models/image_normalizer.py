"""The statistics of CLIP's embeddings of pictures, by which unCLIP (arXiv:2204.06125) puts noise on them."""

from dataclasses import dataclass
from typing import Unpack

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from sdjax.fields import Channels
from sdjax.models.base import Model, ModelConfig
from sdjax.models.layers import LayerArgs


@dataclass(frozen=True)
class ImageNormalizerConfig(ModelConfig):
    """The fields of a diffusers `image_normalizer/config.json`, with its defaults."""

    embedding_dim: Channels = 768

    def compute_dtype(self, dtype: DTypeLike) -> DTypeLike:
        """float32: a few numbers, of which others are the differences."""
        return jnp.float32


class StableUnCLIPImageNormalizer(Model):
    """x and noise [B D], alpha and sigma [B] -> mean + std (alpha (x - mean) / std + sigma noise), float32"""

    config_class = ImageNormalizerConfig

    def __init__(self, config: ImageNormalizerConfig, **kw: Unpack[LayerArgs]):
        self.config = config
        shape, dtype = (1, config.embedding_dim), kw.get("param_dtype", jnp.float32)
        self.mean, self.std = nnx.Param(jnp.zeros(shape, dtype)), nnx.Param(jnp.ones(shape, dtype))

    def __call__(self, x: Array, noise: Array, alpha: Array, sigma: Array) -> Array:
        mean, std = self.mean[...], self.std[...]
        normal = (x.astype(jnp.float32) - mean) / std
        return mean + std * (alpha[:, None] * normal + sigma[:, None] * noise)
