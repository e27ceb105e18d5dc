"""The second pass of pictures that are made small first, then larger: what the web UI calls hires fix."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sdjax.inputs.batches import shared
from sdjax.inputs.given import Given
from sdjax.inputs.sizes import batch_size, side_factor
from sdjax.inputs.tables import table_of
from sdjax.inputs.tasks import GENERATE, task
from sdjax.request import FIELDS, Request
from sdjax.runtime import bounds
from sdjax.runtime.bounds import Load

if TYPE_CHECKING:
    from sdjax.diffusion_pipeline import DiffusionPipeline

STRENGTH = 0.7  # as in the web UI: with less, what was made larger as latents stays blurred
HIRES = ("hires_scale", "hires_strength", "hires_upscaler")
OF_THE_FIRST = ("image", *HIRES)


def second_pass(pipe: "DiffusionPipeline", requests: Sequence[Request], given: Given) -> list[Request] | None:
    """The requests of the second pass, from the latents of the first made larger; None: there is none.

    Its pictures have the first's size times `hires_scale`, rounded down to what the networks take. Raises ValueError
    where it could not run, DoesNotFit where it does not fit.
    """
    scale = shared(requests, "hires_scale")
    for request in {(r.table_key, *(getattr(r, name) for name in HIRES)): r for r in requests}.values():
        check_hires(pipe, request)
    if scale is None:
        return None
    shared(requests, "hires_upscaler")
    if given.denoising_start or given.denoising_end < 1:
        raise ValueError("hires_scale: not with denoising_start and denoising_end")
    factor = side_factor(pipe)
    height, width = (int(side * scale) // factor * factor for side in batch_size(pipe, requests, given.image))
    bounds.check(pipe.models, pipe.mesh, Load.of(pipe.mesh, len(requests), height, width, tiled=requests[0].vae_tiling))
    own = {name: FIELDS[name].default for name in OF_THE_FIRST} | {"width": width, "height": height}
    return [replace(request, **own, strength=strength_of_second(request)) for request in requests]


def strength_of_second(request: Request) -> float:
    """The part of the steps that run again."""
    return STRENGTH if request.hires_strength is None else request.hires_strength


def check_hires(pipe: "DiffusionPipeline", request: Request) -> None:
    """Raises ValueError where a second pass could not run."""
    if request.hires_scale is None:
        for name in HIRES[1:]:
            if getattr(request, name) != FIELDS[name].default:
                raise ValueError(f"{name}: only with hires_scale")
        return
    upscaler = request.hires_upscaler
    if task(pipe) != GENERATE or request.has_mask:
        raise ValueError("hires_scale: not with a mask, nor with a UNet for another task than text to image")
    if upscaler == "model" and pipe.upscaler is None:
        raise ValueError("hires_upscaler: this pipeline has no upscaler; load it with upscaler=…, a file of an ESRGAN")
    if upscaler != "latent" and pipe.vae.encoder is None:
        raise ValueError(f"hires_upscaler: {upscaler} needs a VAE with an encoder; this one has none")
    try:
        table_of(pipe, request.table_key._replace(from_picture=True, strength=strength_of_second(request)))
    except ValueError as error:
        raise ValueError(f"hires_strength, of the second pass: {error}") from None
