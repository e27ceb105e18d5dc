"""The tables of requests."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from sdjax.inputs.given import Given
from sdjax.inputs.tasks import ENLARGE, FROM_NOISE, task
from sdjax.request import Request, TableKey
from sdjax.sampling import Scheduler, Table, from_config
from sdjax.sampling.grid import distilled_timesteps
from sdjax.text import conditioning

if TYPE_CHECKING:
    from sdjax.diffusion_pipeline import DiffusionPipeline


def tables_of(pipe: "DiffusionPipeline", requests: Sequence[Request], given: Given) -> list[Table]:
    """The table of each request; those of equal settings are one."""
    has_latents = given.image is not None or given.first is not None
    from_latents = {"from_picture": True} if has_latents else {}

    @cache
    def table(key: TableKey) -> Table:
        return table_of(pipe, key, denoising_start=given.denoising_start, denoising_end=given.denoising_end)

    return [table(request.table_key._replace(**from_latents)) for request in requests]


def table_of(pipe: "DiffusionPipeline", key: TableKey, **part: float) -> Table:
    """The table of a request, or of the part of it between denoising_start and denoising_end.

    Raises ValueError for what the sampler cannot take.
    """
    strength, timesteps = 1.0 if part.get("denoising_start") else strength_of(pipe, key), key.timesteps
    scheduler, is_enlarging = scheduler_of(pipe, key.scheduler, key.timestep_spacing), task(pipe) == ENLARGE
    if strength < 1 and timesteps is None and _is_of_lcm(pipe, scheduler):
        original, training = scheduler.options.original_inference_steps, len(scheduler.schedule)
        timesteps = distilled_timesteps(training, original, key.num_inference_steps, strength)
        strength = 1.0
    if is_enlarging:  # whatever is stated: see `LatentUpscaler`
        scheduler = from_config(scheduler.config, prediction_type="v_prediction")
    table = scheduler.table(
        key.num_inference_steps,
        strength,
        timesteps=timesteps,
        sigmas=key.sigmas,
        guidance_interval=key.guidance_interval,
        cfg_plus_plus=key.cfg_plus_plus,
        **part,
    )
    return replace(table, t=np.log(scheduler.schedule.level_at(table.t)) / 4) if is_enlarging else table


def _is_of_lcm(pipe: "DiffusionPipeline", scheduler: Scheduler) -> bool:
    """Whether strength leaves the number of steps: PyTorch's own pipelines of LCM spread them over what is left."""
    is_own = pipe.config["_class_name"].startswith("LatentConsistencyModel")
    return is_own and scheduler.config["_class_name"] == "LCMScheduler"


def strength_of(pipe: "DiffusionPipeline", key: TableKey) -> float:
    """The part of the steps that run: 1 where no picture is started from. Raises ValueError for a strength then."""
    if not key.from_picture or task(pipe) in FROM_NOISE:
        if key.strength is not None:
            raise ValueError(
                "strength: only with image, the picture to start from; an edit, an upscaler and a variation start from "
                "noise"
            )
        return 1.0
    own = conditioning.READINGS[pipe.unet.config.addition_embed_type]
    usual = own.mask_strength if key.has_mask else own.strength
    return usual if key.strength is None else key.strength


def from_noise_alone(pipe: "DiffusionPipeline", requests: Sequence[Request]) -> np.ndarray:
    """[B] whether what a mask has white starts from noise, without the picture."""
    return np.array([request.has_mask and strength_of(pipe, request.table_key) == 1 for request in requests])


def scheduler_of(
    pipe: "DiffusionPipeline", scheduler: Scheduler | str | None, timestep_spacing: str | None = None
) -> Scheduler:
    """The sampler of a request: its own or the pipeline's, on the pipeline's noise schedule where it is a name."""
    made = pipe.scheduler if scheduler is None else pipe.as_scheduler(scheduler)
    return made if timestep_spacing is None else from_config(made.config, timestep_spacing=timestep_spacing)
