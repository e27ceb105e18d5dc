"""How large the pictures of requests are, and their latents."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sdjax.inputs.batches import shared
from sdjax.inputs.tasks import ENLARGE, LARGER, UPSCALE, has_size_of_picture, task
from sdjax.models.unet_blocks import at
from sdjax.request import Request
from sdjax.request.values import MAX_SIDE
from sdjax.runtime import bounds
from sdjax.runtime.bounds import Load

if TYPE_CHECKING:
    from sdjax.diffusion_pipeline import DiffusionPipeline

DEFAULT_SIZE = 64  # of the latents, for a UNet that does not say


def picture_size(pipe: "DiffusionPipeline", image: Any = None) -> tuple[int, int]:
    """(height, width) of the picture whose latents are given, else of the pictures of the training."""
    size, factor = pipe.unet.config.sample_size or DEFAULT_SIZE, pipe.vae.config.factor
    h, w = np.shape(image)[1:3] if np.ndim(image) == 4 else (at(size, 0), at(size, 1))
    return h * factor, w * factor


def request_size(pipe: "DiffusionPipeline", request: Request) -> tuple[int, int]:
    """(height, width) of a request's picture. Raises ValueError for a mask that does not fit its image."""
    height, width = picture_size(pipe)
    if request.mask_image is not None and (request.image is None or request.image.size != request.mask_image.size):
        w, h = request.mask_image.size
        own = "none is given" if request.image is None else "it is of {}x{}".format(*request.image.size)
        raise ValueError(f"mask_image, of {w}x{h}: only with an image of this size, and {own}")
    if not request.has_mask and (request.soft_mask or request.mask_blur):
        raise ValueError("soft_mask, mask_blur: only with mask_image, or outpaint")
    if not request.has_mask and request.padding_mask_crop is not None:
        raise ValueError("padding_mask_crop: only with mask_image, or outpaint")
    if request.outpaint is not None and request.image is None:
        raise ValueError("outpaint: only with image, the picture to make larger")
    if task(pipe) in LARGER and request.image is not None:
        return _larger_size(pipe, request)
    if not has_size_of_picture(pipe):
        request = replace(request, image=None)
    if request.image is None and request.control_image is None:
        return request.height or height, request.width or width
    factor = side_factor(pipe)
    width, height = (side // factor * factor for side in request.size)
    if not min(request.height or height, request.width or width):
        size = "{}x{}".format(*request.size)
        raise ValueError(f"a picture of {size} is smaller than {factor}x{factor}: give width and height for it")
    return request.height or height, request.width or width


def _times(pipe: "DiffusionPipeline") -> int:
    """How many times as large it makes pictures: the x4 upscaler as the VAE's decoder, the other one 2 times."""
    return {UPSCALE: pipe.vae.config.factor, ENLARGE: 2}.get(task(pipe), 1)


def _larger_size(pipe: "DiffusionPipeline", request: Request) -> tuple[int, int]:
    """(height, width): so many times those of its picture, which are rounded down to multiples."""
    times = _times(pipe)
    multiple = max(pipe.vae.config.factor, side_factor(pipe) // times)
    width, height = (side // multiple * multiple * times for side in request.image.size)
    shown = "{}x{}".format(*request.image.size)
    if not min(width, height):
        raise ValueError(f"image: a picture of {shown} is too small: {multiple}x{multiple} is the least")
    for name, own in (("width", width), ("height", height)):
        if getattr(request, name) not in (None, own):
            raise ValueError(f"{name}: {own}, where a picture of {shown} is made {times} times as large; leave it out")
    return height, width


def batch_size(pipe: "DiffusionPipeline", requests: Sequence[Request], latents: Any) -> tuple[int, int]:
    """(height, width) of the pictures of a batch; latents: of the pictures that they start from, if these are given."""
    if {latents is not None or request.image is not None for request in requests} == {True, False}:
        raise ValueError("image: the pictures of a batch all start from one, or none does")
    if latents is not None:
        times = _times(pipe) if task(pipe) == ENLARGE else 1  # the x4 upscaler takes no latents
        own = tuple(side * times for side in picture_size(pipe, latents))
        return shared(requests, "height") or own[0], shared(requests, "width") or own[1]
    sizes = list(dict.fromkeys(request_size(pipe, request) for request in requests))
    if len(sizes) > 1:
        (h, w), (other_h, other_w) = sizes[:2]
        raise ValueError(f"the pictures of a batch have one size, and these have {w}x{h} and {other_w}x{other_h}")
    return sizes[0]


def side_factor(pipe: "DiffusionPipeline") -> int:
    """What the sides of pictures are multiples of: the VAE's factor, and those of the T2I-Adapters."""
    least = pipe.vae.config.factor * (2**pipe.unet.config.halvings if task(pipe) == ENLARGE else 1)
    return math.lcm(least, *(getattr(pipe, name).config.downscale_factor for name in pipe.adapters))


def latent_shape(pipe: "DiffusionPipeline", height: int, width: int) -> tuple[int, int, int]:
    """(h, w, C) of a picture's latents. Raises ValueError for a size or a UNet that does not fit the VAE, or for a size
    that does not fit the T2I-Adapters."""
    task(pipe)
    channels, factor = pipe.vae.config.latent_channels, pipe.vae.config.factor
    latent_size(height, width, side_factor(pipe))
    return (*latent_size(height, width, factor), channels)


def latent_size(height: int, width: int, factor: int) -> tuple[int, int]:
    """(h, w) of the latents of a picture of height x width. Raises ValueError for no multiples of the factor."""
    for name, size in (("height", height), ("width", width)):
        if size < 1 or size % factor:
            raise ValueError(f"{name} must be a positive multiple of {factor}, not {size!r}")
    return height // factor, width // factor


def check_fits(pipe: "DiffusionPipeline", pictures: int, arguments: Mapping[str, Any], image: Any = None) -> None:
    """Raises DoesNotFit for more pictures than fit, before there is a request for each. arguments, image: of a call.

    Those that start from pictures, whose sizes are theirs, are left to `prepare`.
    """
    if arguments.get("image") is not None or arguments.get("control_image") is not None:
        return
    height, width = picture_size(pipe, image)
    size = arguments.get("height") or height, arguments.get("width") or width
    if all(isinstance(side, int) and 0 < side <= MAX_SIDE for side in size):
        load = Load.of(pipe.mesh, pictures, *size, tiled=bool(arguments.get("vae_tiling")))
        bounds.check(pipe.models, pipe.mesh, load)
