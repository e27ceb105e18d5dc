"""How much noise is on what a UNet is shown: on a picture that is made larger."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jax import Array

from sdjax.inputs.batches import column
from sdjax.inputs.tasks import UPSCALE, task
from sdjax.request import Request
from sdjax.sampling import Scheduler
from sdjax.sampling.guidance import over
from sdjax.text.conditioning import Condition

if TYPE_CHECKING:
    from sdjax.diffusion_pipeline import DiffusionPipeline

USUAL = {UPSCALE: 20}
MOST = 350  # where model_index.json has no max_noise_level


def check_noise_level(pipe: "DiffusionPipeline", request: Request) -> None:
    """Raises ValueError for a noise_level without use, or too high, and where there is no schedule of the noise."""
    if task(pipe) not in USUAL:
        if request.noise_level is not None:
            raise ValueError("noise_level: only with a UNet that makes pictures larger, such as the x4 upscaler")
        return
    schedule = _scheduler(pipe).schedule
    most = min(pipe.config.get("max_noise_level", MOST), len(schedule) - 1)
    if request.noise_level is not None and request.noise_level > most:
        raise ValueError(f"noise_level must be a whole number from 0 to {most}, not {request.noise_level}")


def noise_labels(pipe: "DiffusionPipeline", requests: Sequence[Request]) -> Condition:
    """{"class_labels": [B]} where the UNet is conditioned on the noise levels. Raises ValueError as
    `check_noise_level`."""
    for request in requests:
        check_noise_level(pipe, request)
    return {"class_labels": _levels(pipe, requests)} if pipe.unet.config.takes_number else {}


def noised(pipe: "DiffusionPipeline", requests: Sequence[Request], shown: Array, noise: Array) -> Array:
    """sqrt(a) x + sqrt(1 - a) noise for x [B ...], with a = prod(1 - beta) at the timestep `noise_level`."""
    alpha_bar = _scheduler(pipe).schedule.alpha_bar[_levels(pipe, requests)]
    alpha, sigma = (pipe.padded(np.sqrt(part).astype(np.float32)) for part in (alpha_bar, 1 - alpha_bar))
    return over(alpha, shown) * shown + over(sigma, shown) * noise


def _levels(pipe: "DiffusionPipeline", requests: Sequence[Request]) -> np.ndarray:
    return column(requests, "noise_level", USUAL[task(pipe)]).astype(np.int32)


def _scheduler(pipe: "DiffusionPipeline") -> Scheduler:
    if pipe.low_res_scheduler is None:
        raise ValueError("this pipeline has no low_res_scheduler, whose noise its UNet is shown")
    return pipe.low_res_scheduler
