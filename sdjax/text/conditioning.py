"""What a UNet is conditioned on: text states and, with some models, pooled text, sizes and the guidance scale."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from sdjax.models import CLIPTextModel, UNet2DConditionConfig
from sdjax.models.latent_upscaler import POOLED
from sdjax.models.layers import timestep_embedding
from sdjax.request import Request
from sdjax.text import prompts
from sdjax.text.encoding import Text

Condition = dict[str, Any]
"""Arguments of the UNet after sample and timesteps, by name, each [B ...]"""


OF_TEXT = ("encoder_hidden_states", "text_embeds")
"""Conditions that follow from the text"""


class Reading(NamedTuple):
    """Which states of its text encoders a UNet reads."""

    layer: int
    """-1: the last layer's, -2: the penultimate's, and so on"""
    normalize: bool
    """whether the final normalisation applies to them"""
    pooled: bool
    """whether it also reads the pooled state of the last text encoder"""
    guidance_scale: float
    strength: float
    mask_strength: float
    """what suit it; with a mask"""


TEXT_TIME = "text_time"
READINGS = {
    None: Reading(-1, True, False, 7.5, 0.8, 1.0),
    TEXT_TIME: Reading(-2, False, True, 5.0, 0.3, 0.9999),
    POOLED: Reading(-1, False, True, 9.0, 0.8, 1.0),
}
"""By the `addition_embed_type` of the UNet: Stable Diffusion 1 and 2, SDXL (arXiv:2307.01952, section 2.1), and the x2
latent upscaler"""

AESTHETIC_SCORES = {"": 6.0, "negative_": 2.5}
"""Defaults of SDXL's refiner (arXiv:2307.01952, appendix)"""


SIZES = ("original_size", "crops_coords_top_left", "target_size")
PREFIXES = ("negative_", "")
SIZE_FIELDS = tuple(f"{prefix}{name}" for prefix in PREFIXES for name in (*SIZES, "aesthetic_score"))
"""What SDXL is conditioned on beside the text: (height, width) in pixels, and how beautiful the picture is"""


def encode(
    encoders: Sequence[CLIPTextModel],
    reading: Reading,
    texts: Sequence[Text],
    added_embeddings: Sequence[Array | None],
    vocab_sizes: Sequence[int],
) -> Condition:
    """{"encoder_hidden_states": [B C*L D]} and, where the UNet reads it, {"text_embeds": [B P]}.

    The states of the encoders stand side by side, those of the chunks one after the other. The pooled text is that of
    the first chunk. added_embeddings: for each encoder the vectors of its added tokens, [N D], or None. vocab_sizes:
    for each encoder the id from which on ids are learned words.
    """
    states = []
    for encoder, text, vectors, size in zip(encoders, texts, added_embeddings, vocab_sizes, strict=True):
        B, C, L = text.ids.shape
        output = encoder.encode(
            text.ids.reshape(B * C, L),
            layer=reading.layer,
            normalize=reading.normalize,
            added_embeddings=vectors,
            vocab_size=size,
        )
        weighted = prompts.weighted(output.states, text.weights.reshape(B * C, L))
        states.append(weighted.reshape(B, C * L, -1))
    condition = {"encoder_hidden_states": jnp.concatenate(states, axis=-1)}
    if reading.pooled:
        condition["text_embeds"] = output.pooled.reshape(B, C, -1)[:, 0]
    return condition


def is_guided(config: UNet2DConditionConfig) -> bool:
    """Whether guidance means two predictions. A UNet distilled on the guidance scale is conditioned on it instead."""
    return config.addition_embed_type == POOLED or config.time_cond_proj_dim is None


def guidance_embedding(config: UNet2DConditionConfig, guidance_scale: Array) -> Condition:
    """{"timestep_cond": [B T]}: the sinusoidal embedding of 1000 (guidance_scale - 1), where the UNet takes it.

    Meng et al. 2023, "On Distillation of Guided Diffusion Models"; Luo et al. 2023 (LCM), section 4.2.
    """
    if is_guided(config):
        return {}
    w = 1000 * (jnp.asarray(guidance_scale, jnp.float32) - 1)
    return {"timestep_cond": timestep_embedding(w, config.time_cond_proj_dim, flip_sin_to_cos=False, freq_shift=1)}


def time_ids(
    config: UNet2DConditionConfig, pooled_width: int, size: tuple[int, int], request: Request | None, prefix: str
) -> np.ndarray:
    """float32 [6]: original size, crop, target size; or [5], for the refiner: original size, crop, score.

    arXiv:2307.01952, section 2.2. size: (height, width) of the picture. What the request leaves out is as of a picture
    that has its own size, is not cropped and scores 6.0, for the negative prompt 2.5. prefix: "negative_" or "". A
    negative value is by default the one without `negative_`; only if another one is given, it is not cropped.
    Raises ValueError where this UNet takes another number of values.
    """
    given = {name: value for name in SIZE_FIELDS if (value := getattr(request, name, None)) is not None}
    if prefix and any(f"{prefix}{name}" in given for name in SIZES):
        given = {f"{prefix}crops_coords_top_left": (0, 0), **given}
    defaults = zip(SIZES, (size, (0, 0), size), strict=True)
    pairs = [np.float32(given.get(f"{prefix}{name}", given.get(name, default))) for name, default in defaults]
    score = given.get(f"{prefix}aesthetic_score", AESTHETIC_SCORES[prefix])
    choices = {6: np.concatenate(pairs), 5: np.append(np.concatenate(pairs[:2]), np.float32(score))}
    wanted = config.time_ids(pooled_width)
    if wanted not in choices:
        raise ValueError(f"this UNet takes {wanted} sizes; known are SDXL's 6 and its refiner's 5")
    return choices[wanted]
