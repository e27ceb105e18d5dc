"""What the run of a batch starts from, and what it puts back, on the devices."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from sdjax.inputs.batches import column
from sdjax.inputs.draws import Draws
from sdjax.inputs.given import Given
from sdjax.inputs.noise_level import noised
from sdjax.inputs.sources import Sources
from sdjax.inputs.tables import from_noise_alone
from sdjax.inputs.tasks import DEPTH, EDIT, ENLARGE, FROM_NOISE, INPAINT, UPSCALE, task
from sdjax.request import Request
from sdjax.runtime import parallel, programs
from sdjax.runtime.programs import Original
from sdjax.sampling import Table
from sdjax.sampling.loop import Known
from sdjax.sampling.noise import INITIAL, MASKED, POSTERIOR, SHOWN

if TYPE_CHECKING:
    from sdjax.diffusion_pipeline import DiffusionPipeline


class Start(NamedTuple):
    """What a run starts from, and what is put back; see `Inputs`, which has these fields."""

    parts: tuple[Array, ...]
    scales: Array
    beside: dict[str, np.ndarray]
    known: Known | None = None
    channels: Array | None = None
    original: Original | None = None


def start_of(
    pipe: "DiffusionPipeline",
    requests: Sequence[Request],
    given: Given,
    draws: Draws,
    found: Sources,
    tables: Sequence[Table],
    stack: Table,
) -> Start:
    """What a batch starts from. tables: of the requests; stack: the same, padded."""
    own, has_mask, (noise, beside) = task(pipe), found.masks is not None, draws
    encode = partial(programs.encode_pictures, pipe.mesh, *pipe.network("vae"))

    clean = given.first if found.latents is None else pipe.padded(found.latents)
    if found.pictures is not None:
        pictures = pipe.padded(found.pictures)
        clean = encode(pictures, noise.get(POSTERIOR))
    parts, scales = _parts(
        stack,
        None if own in FROM_NOISE else clean,
        None if given.denoising_start else noise[INITIAL],
        parallel.pad(from_noise_alone(pipe, requests), stack.t.shape[1]),
    )
    made = Start(parts, parallel.split(scales.astype(np.float32), pipe.mesh), beside)
    if own == EDIT:
        return made._replace(channels=pipe.vae.config.unscaled(clean))
    if own == ENLARGE:
        return made._replace(channels=jnp.repeat(jnp.repeat(clean, 2, axis=1), 2, axis=2))
    if own == UPSCALE:
        return made._replace(channels=noised(pipe, requests, pipe.padded(found.shown), noise[SHOWN]))
    if own == DEPTH:
        return made._replace(channels=pipe.padded(found.depths))
    if not has_mask:
        return made
    made = made._replace(original=_original(pipe, requests, found, pictures))
    soft, factor = column(requests, "soft_mask", None), pipe.vae.config.factor
    free = np.where(soft[:, None, None, None], found.masks, found.masks >= 0.5).astype(np.float32)
    small = pipe.padded(free[:, ::factor, ::factor])
    if own == INPAINT:
        left = encode(jnp.where(pipe.padded(free) > 0, 0, pictures), noise.get(MASKED))
        return made._replace(channels=jnp.concatenate([small, left], axis=-1))
    after = _after(stack, tables, soft, is_clean=given.denoising_end == 1)
    return made._replace(known=Known(small, clean, noise[INITIAL]), beside=beside | {"after": after})


def _original(pipe: "DiffusionPipeline", requests: Sequence[Request], found: Sources, pictures: Array) -> Original:
    """What the pictures are pasted into: the pictures that they start from, of which they may be regions."""
    soft, kept, blur = (
        column(requests, name, None)[:, None, None, None] for name in ("soft_mask", "keep_unmasked", "mask_blur")
    )
    masks = found.masks if found.whole is None else found.whole.masks
    pasted = np.where(soft, masks > 0, np.where(blur > 0, masks, masks >= 0.5))
    pasted = pipe.padded(np.where(kept, pasted, 1).astype(np.float32))
    if found.whole is None:
        return Original(pictures, pasted)
    return Original(pipe.padded(found.whole.pictures), pasted, pipe.padded(found.whole.boxes))


def _after(stack: Table, tables: Sequence[Table], soft: np.ndarray, *, is_clean: bool) -> np.ndarray:
    """[R B 3] how much of the clean sample and of the noise x is made of after each row, and how white the mask is at
    most where that is put back: half, or, for a soft mask, 1 - (row + 1) / rows.

    is_clean: whether it is the clean sample alone after the last row, whatever level the table ends at.
    """
    rows, images = stack.t.shape
    after = np.concatenate([stack.marginals[1:], np.full((rows, images, 1), 0.5)], axis=-1).astype(np.float32)
    for image, table in enumerate(tables):
        if is_clean:
            after[len(table) - 1 :, image, :2] = 1, 0
        if soft[image]:
            after[:, image, 2] = np.maximum(0, 1 - (np.arange(rows) + 1) / len(table))
    return after


def _parts(
    stack: Table, clean: Array | None, noise: Array | None, is_whole: np.ndarray
) -> tuple[tuple[Array, ...], np.ndarray]:
    """What x before the first row is the sum of, and how many times each, [B P]; is_whole [B]: of noise alone."""
    sigma = stack.init_noise_sigma[:, None]
    if clean is None:
        return (noise,), sigma
    if noise is None:
        return (clean,), np.ones((len(clean), 1))
    return (clean, noise), np.where(is_whole[:, None], np.concatenate([0 * sigma, sigma], axis=1), stack.marginals[0])
