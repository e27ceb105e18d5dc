"""The safety checker of Stable Diffusion: CLIP's image encoder (arXiv:2103.00020) and concepts to compare with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from sdjax.fields import Channels, checked
from sdjax.models.base import Model, ModelConfig
from sdjax.models.clip_vision import MEAN, STD, CLIPVisionConfig, VisionTransformer
from sdjax.models.layers import LayerArgs, linear

CONCEPTS, SPECIAL_CARE = 17, 3
ADJUSTMENT = 0.01  # by which concepts are nearer in a picture with a special care concept


@dataclass(frozen=True)
class StableDiffusionSafetyCheckerConfig(ModelConfig):
    """The fields of a `safety_checker/config.json` (a transformers CLIPConfig) of the vision model."""

    projection_dim: Channels = 512
    vision_config: CLIPVisionConfig = field(default_factory=CLIPVisionConfig)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Old configs have `vision_config_dict`, which then stands for the whole of `vision_config`."""
        vision = config.get("vision_config_dict") or config.get("vision_config") or {}
        vision = CLIPVisionConfig.from_dict(checked("vision_config", vision, dict[str, Any]))
        return super().from_dict(
            {"projection_dim": config.get("projection_dim", cls.projection_dim), "vision_config": vision}
        )


def clip_pixels(images: Array, size: int) -> Array:
    """Pictures [B H W 3] in 0..1 as CLIP sees them: [B size size 3], float32, normalised.

    Rounded to 8 bits; the shorter side resized to `size`, bicubic with antialiasing; the middle cut out. Bit for bit
    what Pillow gives: first along the width, then along the height, each time in fixed point and rounded to 8 bits.
    """
    H, W = images.shape[1:3]
    pixels = jnp.round(images.astype(jnp.float32) * 255)
    for equation, length in (("bhwc,kxw->kbhxc", W), ("bhwc,kyh->kbywc", H)):
        new_length = int(size * length / min(H, W))
        start = (new_length - size) // 2
        weights = bicubic_weights(length, new_length)[start : start + size]
        pixels = _weighted(equation, pixels, weights)
    return (pixels / 255 - jnp.float32(MEAN)) / jnp.float32(STD)


def _weighted(equation: str, pixels: Array, weights: np.ndarray) -> Array:
    """Sums of whole pixels in 0..255, weighted in 22-bit fixed point, then rounded and clipped to 0..255.

    The weights' upper and lower halves are summed apart: float32 is exact up to 2^24.
    """
    fixed = np.rint(weights * 2**22)
    upper = np.rint(fixed / 2**11)
    halves = jnp.asarray(np.stack([upper, fixed - upper * 2**11]), jnp.float32)
    sums = jnp.einsum(equation, pixels, halves, precision=jax.lax.Precision.HIGHEST).astype(jnp.int32)
    return jnp.clip((sums[0] * 2**11 + sums[1] + 2**21) >> 22, 0, 255).astype(jnp.float32)


def bicubic_weights(length: int, new_length: int) -> np.ndarray:
    """[new_length length] float64: what each old pixel gives to each new one.

    Keys' cubic kernel with a = -1/2 (doi:10.1109/TASSP.1981.1163711), stretched where the picture shrinks.
    """
    scale = length / new_length
    centres = (np.arange(new_length) + 0.5) * scale
    x = np.abs(np.arange(length) + 0.5 - centres[:, None]) / max(scale, 1)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.select([x < 1, x < 2], [near, far], 0)
    return weights / weights.sum(1, keepdims=True)


class CLIPVisionModel(nnx.Module):
    """The transformer, one level deeper, where published checkpoints have it."""

    def __init__(self, config: CLIPVisionConfig, **kw: Unpack[LayerArgs]):
        self.vision_model = VisionTransformer(config, **kw)

    def __call__(self, pixels: Array) -> Array:
        return self.vision_model(pixels)


class StableDiffusionSafetyChecker(Model):
    """Pictures [B H W 3] in 0..1 -> [B] bool: what should not be shown

    A picture is flagged where the cosine of its embedding and a concept's is over the concept's threshold, or within
    0.01 of it where one of the special-care concepts is over its own; all in 3 decimals. The embeddings and thresholds
    of concepts are float32 whatever the dtype. A picture whose embedding is not finite, as float16 may make it, is
    flagged: nothing is known of it.
    """

    config_class = StableDiffusionSafetyCheckerConfig
    weights_stem = "model"
    # transformers 5 saves without the inner prefix that every published checkpoint has
    renames = ((r"^vision_model\.(?!vision_model\.)", "vision_model.vision_model."),)
    ignored = r"position_ids$"

    def __init__(self, config: StableDiffusionSafetyCheckerConfig, **kw: Unpack[LayerArgs]):
        self.config = config
        channels = config.projection_dim
        self.vision_model = CLIPVisionModel(config.vision_config, **kw)
        self.visual_projection = linear(config.vision_config.hidden_size, channels, use_bias=False, **kw)
        self.concept_embeds = nnx.Param(jnp.ones((CONCEPTS, channels)))
        self.concept_embeds_weights = nnx.Param(jnp.ones(CONCEPTS))
        self.special_care_embeds = nnx.Param(jnp.ones((SPECIAL_CARE, channels)))
        self.special_care_embeds_weights = nnx.Param(jnp.ones(SPECIAL_CARE))

    def __call__(self, images: Array) -> Array:
        return self.flag(self.embed(clip_pixels(images, self.config.vision_config.image_size)))

    def embed(self, pixels: Array) -> Array:
        """Pixels as `clip_pixels` gives them [B S S 3] -> image embeddings [B P]"""
        return self.visual_projection(self.vision_model(pixels))

    def flag(self, embeds: Array) -> Array:
        """Image embeddings [B P] -> [B] bool"""
        special = _excess(embeds, self.special_care_embeds[...], self.special_care_embeds_weights[...])
        careful = ADJUSTMENT * special.any(axis=1, keepdims=True)
        flagged = _excess(embeds, self.concept_embeds[...], self.concept_embeds_weights[...] - careful).any(axis=1)
        return flagged | ~jnp.isfinite(embeds).all(axis=1)

    def config_header(self) -> dict[str, Any]:
        """What transformers reads to know the class, and to load in float32, as diffusers does, any weights."""
        return {"architectures": [type(self).__name__], "model_type": "clip", "dtype": "float32"}


def _excess(embeds: Array, concepts: Array, thresholds: Array) -> Array:
    """[B P], [N P], [N] or [B N] -> [B N] bool: cosine(embeds, concepts) - thresholds is over 0 in 3 decimals"""
    cosines = jnp.einsum("bp,np->bn", _unit(embeds), _unit(concepts), precision=jax.lax.Precision.HIGHEST)
    return jnp.round(1000 * (cosines - thresholds)) > 0


def _unit(x: Array) -> Array:
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
