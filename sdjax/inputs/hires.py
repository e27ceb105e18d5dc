"""The second pass of pictures that are made small first, then larger: what the web UI calls hires fix."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sdjax.inputs.batches import shared
from sdjax.inputs.given import Given
from sdjax.inputs.sizes import request_size
from sdjax.inputs.tables import table_of
from sdjax.inputs.tasks import GENERATE, task
from sdjax.request import FIELDS, Request
from sdjax.runtime import bounds
from sdjax.runtime.bounds import Load

if TYPE_CHECKING:
    from sdjax.diffusion_pipeline import DiffusionPipeline

STRENGTH = 0.7  # as in the web UI: with less, what was made larger as latents stays blurred
OF_THE_FIRST = ("image", "strength", "hires_scale", "hires_strength", "hires_upscaler")


def second_pass(pipe: "DiffusionPipeline", requests: Sequence[Request], given: Given) -> list[Request] | None:
    """The requests of the second pass, from the latents of the first made larger; None: there is none.

    Its pictures have the first's size times `hires_scale`, rounded down to what the VAE can have. Raises ValueError
    where it could not run, DoesNotFit where it does not fit.
    """
    scale, upscaler = shared(requests, "hires_scale"), shared(requests, "hires_upscaler")
    if scale is None:
        if any(request.hires_strength is not None for request in requests):
            raise ValueError("hires_strength: only with hires_scale")
        return None
    if given.denoising_start or given.denoising_end < 1:
        raise ValueError("hires_scale: not with denoising_start and denoising_end")
    if task(pipe) != GENERATE or any(request.has_mask for request in requests):
        raise ValueError("hires_scale: not with a mask, nor with a UNet for inpainting or editing")
    if upscaler == "model" and pipe.upscaler is None:
        raise ValueError("hires_upscaler: this pipeline has no upscaler; load it with upscaler=…, a file of an ESRGAN")
    if upscaler != "latent" and pipe.vae.encoder is None:
        raise ValueError(f"hires_upscaler: {upscaler} needs a VAE with an encoder; this one has none")
    factor = pipe.vae.config.factor
    height, width = (int(side * scale) // factor * factor for side in request_size(pipe, requests[0]))
    bounds.check(pipe.models, pipe.mesh, Load.of(pipe.mesh, len(requests), height, width, tiled=requests[0].vae_tiling))
    own = {name: FIELDS[name].default for name in OF_THE_FIRST} | {"width": width, "height": height}
    strengths = [STRENGTH if request.hires_strength is None else request.hires_strength for request in requests]
    second = [replace(r, **own | {"strength": strength}) for r, strength in zip(requests, strengths, strict=True)]
    for key in {request.table_key._replace(from_picture=True) for request in second}:
        table_of(pipe, key)
    return second
