"""Pictures fetched from the devices."""

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from sdjax.pipeline import StableDiffusionPipelineOutput


class Sampled(NamedTuple):
    """A picture that the devices have computed."""

    tag: Any
    pixels: np.ndarray | None
    """uint8 [H W 3]; None: not finite"""
    nsfw: bool | None
    """whether the safety checker flagged it; None if there is no safety checker"""
    seconds: float
    """its share of the time of the devices"""
    mended: bool
    """whether a float16 VAE overflowed, so that it was decoded again in float32"""


def in_uint8(made: "StableDiffusionPipelineOutput") -> "StableDiffusionPipelineOutput":
    """The same, with pictures of float32 in 0..1 on the devices as uint8."""
    return replace(made, images=_to_uint8(made.images))


@jax.jit
def _to_uint8(pictures: jax.Array) -> jax.Array:
    """uint8 from float32 in 0..1, rounded to the nearest."""
    return jnp.round(pictures * 255).astype(jnp.uint8)


def fetched(made: "StableDiffusionPipelineOutput", wanted: Iterable[tuple[int, Any]], seconds: float) -> list[Sampled]:
    """Waits for the devices; of what `in_uint8` gave, those that are wanted, by (place, tag).

    seconds: of each.
    """
    lost = not_finite = np.asarray(made.not_finite)
    if lost.any():
        made = in_uint8(made.mended())
        not_finite = np.asarray(made.not_finite)
    pixels, flags = np.asarray(made.images), made.nsfw_content_detected
    flags = None if flags is None else np.asarray(flags)
    return [
        Sampled(
            tag,
            pixels=None if not_finite[place] else pixels[place],
            nsfw=None if flags is None else bool(flags[place]),
            seconds=seconds,
            mended=bool(lost[place] and not not_finite[place]),
        )
        for place, tag in wanted
    ]
