"""What ControlNets and T2I-Adapters are shown and how much they weigh, of requests.

The ControlNets come first, in pictures and values alike; here all of them are networks.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from sdjax.inputs.batches import column
from sdjax.inputs.sources import box_of, mask_of, seen
from sdjax.pictures import pixels
from sdjax.pictures.picture import Picture
from sdjax.pictures.pixels import Box
from sdjax.pictures.preprocessors import INPAINT, NONE, preprocessor
from sdjax.request import FIELDS, Request
from sdjax.runtime import parallel, programs
from sdjax.runtime.denoiser import Control
from sdjax.sampling import Table

if TYPE_CHECKING:
    from sdjax.diffusion_pipeline import DiffusionPipeline

WEIGHTS = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
BY_NETWORK = ("control_image", "control_preprocessor", *WEIGHTS)
"""Fields of which each network has its own value, or all share one"""
READ = 8  # pictures that are remembered: a batch may be shown one many times


def by_image(arguments: Mapping[str, Any], networks: int) -> dict[str, Any]:
    """The arguments of a call; with several networks a list in BY_NETWORK is one value, a list of lists several."""
    several = {
        name: [list(value)]
        for name in BY_NETWORK
        if networks > 1 and _is_flat(value := arguments.get(name), 4 if name == "control_image" else 1)
    }
    return {**arguments, **several}


def _is_flat(value: Any, axes: int) -> bool:
    """Whether this is a list without lists in it, or an array of so many axes."""
    is_list = isinstance(value, list | tuple) and not any(isinstance(one, list | tuple) for one in value)
    return is_list or getattr(value, "ndim", None) == axes


def check_control(pipe: "DiffusionPipeline", request: Request) -> None:
    """Raises ValueError where the networks have not a picture each, a weight and a part of the steps."""
    networks, shown = len(pipe.controls), len(request.control_image or ())
    unused = (name for name in (*BY_NETWORK[1:], "guess_mode") if getattr(request, name) != FIELDS[name].default)
    if not networks and (name := next(unused, None)):
        raise ValueError(f"{name}: only with a ControlNet or a T2I-Adapter, and this pipeline has none")
    if shown and not networks:
        raise ValueError("control_image: this pipeline has no ControlNet; load it with controlnet=… or adapter=…")
    if shown != networks:
        raise ValueError(f"control_image: {shown} pictures; this pipeline has {_counted(pipe)}: one for each")
    for name in BY_NETWORK[1:]:
        if len(getattr(request, name)) not in (1, networks or 1):
            raise ValueError(f"{name}: {len(getattr(request, name))} values for {_counted(pipe)}")
    for start, end in zip(*(_each(request, name, networks) for name in WEIGHTS[1:]), strict=True):
        if start >= end:
            raise ValueError(f"control_guidance_start, {start:g}, must be below control_guidance_end, {end:g}")
    if shown and request.padding_mask_crop is not None:
        for picture in request.control_image:
            if request.image is not None and picture.size != request.image.size:
                raise ValueError("control_image: must have the size of image, whose region padding_mask_crop cuts out")
    for name in request.control_preprocessor:
        if name == INPAINT and not request.has_mask:
            raise ValueError("control_preprocessor: inpaint needs image, and mask_image or outpaint")
        if name != INPAINT:
            preprocessor(name)


def _counted(pipe: "DiffusionPipeline") -> str:
    counts = {"ControlNet": len(pipe.controlnets), "T2I-Adapter": len(pipe.adapters)}
    return " and ".join(f"{count} {name}{'s' * (count > 1)}" for name, count in counts.items() if count)


def control_pictures(
    pipe: "DiffusionPipeline", requests: Sequence[Request], height: int, width: int
) -> list[np.ndarray]:
    """For each network [B H W 3] in 0..1. Raises ValueError as `check_control`."""
    for request in requests:
        check_control(pipe, request)
    return [
        np.stack([_shown(request, k, len(pipe.controls), width, height) for request in requests])
        for k in range(len(pipe.controls))
    ]


def _shown(request: Request, k: int, networks: int, width: int, height: int) -> np.ndarray:
    """[H W 3] what network k is shown."""
    name, picture = _each(request, "control_preprocessor", networks)[k], request.control_image[k]
    box = box_of(request, width, height)
    outpaint = request.outpaint if request.image is not None and picture.size == request.image.size else None
    if name != INPAINT:
        return _preprocessed(picture, outpaint, box, name, width, height)
    known = _preprocessed(picture, outpaint, box, NONE, width, height)
    return np.where(mask_of(request, box, width, height) >= 0.5, -1, known)


@lru_cache(READ)
def _preprocessed(
    picture: Picture, outpaint: Box | None, box: Box | None, name: str, width: int, height: int
) -> np.ndarray:
    made = preprocessor(name)(pixels.resized(seen(picture, outpaint, box), width, height))
    return np.asarray(made, np.float32) / 255


def _each(request: Request, name: str, networks: int) -> Sequence[Any]:
    values = getattr(request, name)
    return values if len(values) > 1 else values * networks


def controls_of(
    pipe: "DiffusionPipeline",
    requests: Sequence[Request],
    shown: Sequence[np.ndarray],
    tables: Sequence[Table],
    rows: int,
) -> tuple[Control | None, dict[str, np.ndarray]]:
    """What the denoiser is given, and {"control": [R B K]}, the weight of each in each row; (None, {}) without."""
    if not shown:
        return None, {}
    names, controlnets = pipe.controls, pipe.controlnets
    embedded = tuple(
        programs.embed_control(pipe.mesh, *pipe.network(name), pipe.padded(own))
        for name, own in zip(names, shown, strict=True)
    )
    averaged = any(getattr(pipe, name).config.global_pool_conditions for name in controlnets[:1])
    guesses = column(requests, "guess_mode", False) | averaged
    weights = [_weights(request, len(names), len(table), rows) for request, table in zip(requests, tables, strict=True)]
    padded = parallel.pad(np.stack(weights), parallel.padded_size(len(requests), pipe.mesh.size))
    pictures, features = embedded[: len(controlnets)], embedded[len(controlnets) :]
    return Control(pictures, pipe.padded(guesses), features), {"control": np.moveaxis(padded, 0, 1)}


def _weights(request: Request, networks: int, n: int, rows: int) -> np.ndarray:
    """[R K] float32: in row i of n a network has its weight, or 0 where i / n < start or (i + 1) / n > end."""
    scale, start, end = (np.float64(_each(request, name, networks)) for name in WEIGHTS)
    i = np.arange(rows)[:, None]
    return np.where((i / n < start) | ((i + 1) / n > end), 0, scale).astype(np.float32)
