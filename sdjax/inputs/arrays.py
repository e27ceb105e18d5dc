"""From requests to the arrays that the compiled programs take, all checked before the first text is encoded."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jax import Array

from sdjax.inputs.batches import column, shared
from sdjax.inputs.changing import changing_branches
from sdjax.inputs.control import control_pictures, controls_of
from sdjax.inputs.draws import draws_of
from sdjax.inputs.given import NOTHING, Given
from sdjax.inputs.guidance import guidance_of
from sdjax.inputs.ip_adapter import prompt_pictures, with_prompt_pictures
from sdjax.inputs.sizes import batch_size, latent_shape
from sdjax.inputs.sources import sources
from sdjax.inputs.start import start_of
from sdjax.inputs.tables import tables_of
from sdjax.inputs.variations import with_varied_pictures
from sdjax.request import Request
from sdjax.runtime import bounds, jax_settings
from sdjax.runtime.bounds import Load
from sdjax.runtime.denoiser import Control
from sdjax.runtime.programs import Original
from sdjax.sampling import Table
from sdjax.sampling.loop import Known
from sdjax.sampling.noise import seed_keys
from sdjax.text.conditioning import Condition

if TYPE_CHECKING:
    from sdjax.diffusion_pipeline import DiffusionPipeline


class Inputs(NamedTuple):
    """What the denoising program takes, images first, padded to whole batches on every device."""

    table: Table
    """a stack, one table for each image"""
    keys: Array
    """[B 2] of the seeds"""
    parts: tuple[Array, ...]
    """each [B h w C]: what x before the first row is the sum of: noise, a picture's latents and noise, or latents"""
    scales: Array
    """[B P] how many times each of the parts: noise the tables' `init_noise_sigma` times, a picture's latents and noise
    by their `marginals`, latents to go on from once"""
    beside: dict[str, np.ndarray]
    """columns beside those of the table, on the host, see `loop.Rows`"""
    branches: tuple[Condition, ...]
    """what the UNet is conditioned on, once for each prediction that guidance combines; the prompt's is the last"""
    weights: Array
    """[B N] the guided prediction is sum_n weights[n] * prediction[n]"""
    rescale: Array
    """[B] how much of the contrast that guidance adds is taken back"""
    perpendicular: Array | None = None
    """[B] how many times the perpendicular part of the negative prompt is taken off"""
    mimic: Array | None = None
    """[B 2] what guidance makes the size of values be like, see `guidance.weighted`"""
    known: Known | None = None
    """what is put back after each row"""
    channels: Array | None = None
    """[B h w D] what the UNet takes beside x: the mask and the latents of what it leaves, or a picture's latents"""
    control: Control | None = None
    """what ControlNets are given, and what T2I-Adapters give"""
    original: Original | None = None
    """what the pictures are pasted into"""

    def forms(self, described: Callable[[Any], Any] = lambda tree: tree) -> dict[str, Any]:
        """What `lowering.lower` takes beside branches and latents; described: of arrays, what stands for them."""
        names = ("perpendicular", "mimic", "known", "channels", "control", "original")
        own = {name: described(getattr(self, name)) for name in names}
        threshold = self.table.threshold
        columns = self.beside if threshold is None else self.beside | {"threshold": threshold}
        return own | {"beside": {name: column.shape[2:] for name, column in columns.items()}}

    def guidance(self, branches: int) -> tuple[Array, ...]:
        """What the denoising program takes for so many of the branches."""
        return (self.weights, self.rescale, self.perpendicular, self.mimic) if branches > 1 else ()


@jax_settings.fixed()
def prepare(pipe: "DiffusionPipeline", requests: Sequence[Request], given: Given = NOTHING) -> Inputs:
    """The inputs of a batch of requests, which share what selects its programs.

    Raises ValueError that names the field.
    """
    size = batch_size(pipe, requests, given.image)
    shape = latent_shape(pipe, *size)
    load = Load.of(pipe.mesh, len(requests), *size, tiled=shared(requests, "vae_tiling"))
    bounds.check(pipe.models, pipe.mesh, load)
    tables, found = tables_of(pipe, requests, given), sources(pipe, requests, given, shape)
    seen, guidance = control_pictures(pipe, requests, *size), guidance_of(pipe, requests)
    shown = prompt_pictures(pipe, requests, given.image_embeds, guidance, shape[:2])
    branches, variants = changing_branches(pipe, requests, given, load, guidance, tables)
    branches = with_prompt_pictures(pipe, requests, shown, guidance, branches)
    keys = pipe.padded(seed_keys([request.seed for request in requests]))
    stack = Table.stack(tables + tables[-1:] * (len(keys) - len(tables)))
    control, weights_by_row = controls_of(pipe, requests, seen, tables, len(stack))
    draws = draws_of(pipe, requests, given, keys, shape, found, stack)
    branches = with_varied_pictures(pipe, requests, found.shown, guidance, branches, draws.first)
    start = start_of(pipe, requests, given, draws, found, tables, stack)
    start = start._replace(beside=start.beside | weights_by_row | variants)
    rescale = column(requests, "guidance_rescale", 0.0).astype(np.float32)
    given = guidance._asdict() | {"rescale": rescale}
    names = ("weights", "rescale", "perpendicular", "mimic")
    weights = {name: pipe.padded(given[name]) for name in names if given[name] is not None}
    return Inputs(table=stack, keys=keys, branches=branches, control=control, **weights, **start._asdict())
