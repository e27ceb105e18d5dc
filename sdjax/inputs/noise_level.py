"""How much noise is on what a UNet is shown: on a picture that is made larger, or on the embedding of one to vary."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jax import Array

from sdjax.inputs.batches import column
from sdjax.inputs.tasks import UPSCALE, VARY, task
from sdjax.request import Request
from sdjax.sampling import Scheduler
from sdjax.sampling.guidance import over
from sdjax.text.conditioning import Condition

if TYPE_CHECKING:
    from sdjax.diffusion_pipeline import DiffusionPipeline

USUAL = {UPSCALE: 20, VARY: 0}
SCHEDULERS = {UPSCALE: "low_res_scheduler", VARY: "image_noising_scheduler"}
MOST = 350  # of the upscaler, where model_index.json has no max_noise_level


def check_noise_level(pipe: "DiffusionPipeline", request: Request) -> None:
    """Raises ValueError for a noise_level without use, or too high, and where there is no schedule of the noise."""
    own = task(pipe)
    if own not in USUAL:
        if request.noise_level is not None:
            raise ValueError("noise_level: only with a UNet that makes pictures larger or varies them")
        return
    level = USUAL[own] if request.noise_level is None else request.noise_level
    most = len(_scheduler(pipe).schedule) - 1
    if own == UPSCALE:
        classes = pipe.unet.config.num_class_embeds or len(_scheduler(pipe).schedule)
        most = min(most, pipe.config.get("max_noise_level", MOST), classes - 1)
    if level > most:
        raise ValueError(f"noise_level must be a whole number from 0 to {most}, not {level}")


def noise_labels(pipe: "DiffusionPipeline", requests: Sequence[Request]) -> Condition:
    """{"class_labels": [B]} where the UNet is conditioned on the noise levels. Raises ValueError as
    `check_noise_level`."""
    for request in requests:
        check_noise_level(pipe, request)
    return {"class_labels": noise_levels(pipe, requests)} if _takes_levels(pipe) else {}


def noised(pipe: "DiffusionPipeline", requests: Sequence[Request], shown: Array, noise: Array) -> Array:
    """alpha x + sigma noise for x [B ...], of `noise_amounts`."""
    alpha, sigma = noise_amounts(pipe, requests)
    return over(alpha, shown) * shown + over(sigma, shown) * noise


def noise_amounts(pipe: "DiffusionPipeline", requests: Sequence[Request]) -> tuple[Array, Array]:
    """sqrt(a) and sqrt(1 - a), [B], with a = prod(1 - beta) up to the timestep `noise_level`."""
    alpha_bar = _scheduler(pipe).schedule.alpha_bar[noise_levels(pipe, requests)]
    return tuple(pipe.padded(np.sqrt(part).astype(np.float32)) for part in (alpha_bar, 1 - alpha_bar))


def noise_levels(pipe: "DiffusionPipeline", requests: Sequence[Request]) -> np.ndarray:
    """[B] int32"""
    return column(requests, "noise_level", USUAL[task(pipe)]).astype(np.int32)


def _takes_levels(pipe: "DiffusionPipeline") -> bool:
    return task(pipe) == UPSCALE and pipe.unet.config.takes_number


def _scheduler(pipe: "DiffusionPipeline") -> Scheduler:
    name = SCHEDULERS[task(pipe)]
    if (scheduler := getattr(pipe, name)) is None:
        raise ValueError(f"this pipeline has no {name}, whose noise is on what its UNet is shown")
    return scheduler
