"""The noise of a batch: drawn before its rows, in the order of PyTorch diffusers, and for them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jax import Array

from sdjax.inputs.batches import shared
from sdjax.inputs.given import Given
from sdjax.inputs.sources import Sources
from sdjax.inputs.tables import from_noise_alone
from sdjax.inputs.tasks import EDIT, ENLARGE, INPAINT, VARY, task
from sdjax.request import Request
from sdjax.runtime import parallel, programs
from sdjax.sampling import Table, torch_generators
from sdjax.sampling.noise import INITIAL, MASKED, POSTERIOR, SHOWN

if TYPE_CHECKING:
    from sdjax.diffusion_pipeline import DiffusionPipeline


class Draws(NamedTuple):
    """Standard normal noise."""

    first: dict[int, Array]
    """before the rows, [B ...], by its number, see `sampling.noise`"""
    beside: dict[str, np.ndarray]
    """that of the table's rows, {"noise": [R B h w C]}; {}: the keys give it, or there is none"""


def draws_of(
    pipe: "DiffusionPipeline",
    requests: Sequence[Request],
    given: Given,
    keys: Array,
    shape: tuple[int, int, int],
    found: Sources,
    stack: Table,
) -> Draws:
    """What a batch of latents of this shape [h w C] draws. stack: of its tables, padded as the keys are."""
    own, has_mask = task(pipe), found.masks is not None
    is_whole = from_noise_alone(pipe, requests)
    drawn = {
        POSTERIOR: found.pictures is not None and own != EDIT and not (own == INPAINT and is_whole.all()),
        SHOWN: found.shown is not None,
        INITIAL: found.noise is None and (has_mask or not given.denoising_start),
        MASKED: has_mask,
    }
    if not pipe.vae.config.is_variational:
        drawn[POSTERIOR] = drawn[MASKED] = False
    shapes = {number: shape for number, is_drawn in drawn.items() if is_drawn}
    if own == ENLARGE and drawn[POSTERIOR]:
        shapes[POSTERIOR] = (shape[0] // 2, shape[1] // 2, shape[2])
    if found.shown is not None:
        shapes[SHOWN] = (pipe.image_encoder.config.projection_dim,) if own == VARY else found.shown.shape[1:]
    first, beside = _drawn(pipe, requests, keys, shapes, shape, stack)
    if found.noise is not None:
        first[INITIAL] = pipe.padded(found.noise)
    if has_mask and pipe.vae.config.is_variational and POSTERIOR not in first:
        first[POSTERIOR] = first[INITIAL]  # its picture weighs nothing; one program encodes both
    return Draws(first, beside)


def _drawn(
    pipe: "DiffusionPipeline",
    requests: Sequence[Request],
    keys: Array,
    shapes: dict[int, tuple[int, ...]],
    shape: tuple[int, int, int],
    stack: Table,
) -> tuple[dict[int, Array], dict[str, np.ndarray]]:
    """Of these shapes by number, in this order, then of the latents' for the rows."""
    kind = shared(requests, "noise")
    if kind == "jax":
        return {number: programs.noise(pipe.mesh, keys, np.uint32(number), own) for number, own in shapes.items()}, {}
    seeds, adds_noise = [request.seed for request in requests], stack.adds_noise.T[: len(requests)]
    first, draws = torch_generators.latents(kind, seeds, shape, adds_noise, before=list(shapes.values()))
    beside = {} if draws is None else {"noise": np.moveaxis(parallel.pad(draws, len(keys)), 0, 1)}
    return dict(zip(shapes, map(pipe.padded, first), strict=True)), beside
