"""What ControlNets and T2I-Adapters are shown and how much they weigh, of requests.

The ControlNets come first, in pictures and values alike; here all of them are networks. Each is shown one picture, but
a ControlNet-Union, if there is one of these, all that are left.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from sdjax.inputs.batches import column
from sdjax.inputs.sources import box_of, mask_of, seen
from sdjax.models import ControlNetUnionModel
from sdjax.models.controlnet_union import Typed
from sdjax.pictures import pixels
from sdjax.pictures.picture import Picture, remembered
from sdjax.pictures.pixels import Box
from sdjax.pictures.preprocessors import INPAINT, NONE, preprocessor
from sdjax.request import FIELDS, Request, spread
from sdjax.runtime import parallel, programs
from sdjax.runtime.denoiser import Control
from sdjax.sampling import Table

if TYPE_CHECKING:
    from sdjax.diffusion_pipeline import DiffusionPipeline

WEIGHTS = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
SHARED = ("control_preprocessor", *WEIGHTS)
"""Fields of which each picture has its own value, or all share one"""
BY_PICTURE = ("control_image", "control_mode", *SHARED)
"""Fields of which there may be a value for each picture"""
READ = 8  # pictures that are remembered: a batch may be shown one many times


def by_image(pipe: "DiffusionPipeline", arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call; where a request may have several pictures, a list in BY_PICTURE is one value, a list of
    lists several."""
    has_several = len(pipe.controls) > 1 or any(map(partial(_is_union, pipe), pipe.controls))
    found = {
        name: [list(value)]
        for name in BY_PICTURE
        if has_several and _is_flat(value := arguments.get(name), 4 if name == "control_image" else 1)
    }
    return {**arguments, **found}


def _is_union(pipe: "DiffusionPipeline", name: str) -> bool:
    return isinstance(getattr(pipe, name), ControlNetUnionModel)


def _is_flat(value: Any, axes: int) -> bool:
    """Whether this is a list without lists in it, or an array of so many axes."""
    is_list = isinstance(value, list | tuple) and not any(isinstance(one, list | tuple) for one in value)
    return is_list or getattr(value, "ndim", None) == axes


def check_control(pipe: "DiffusionPipeline", request: Request) -> None:
    """Raises ValueError where the networks have not a picture each, a weight and a part of the steps."""
    networks, shown = len(pipe.controls), len(request.control_image or ())
    unused = (name for name in (*BY_PICTURE[1:], "guess_mode") if getattr(request, name) != FIELDS[name].default)
    if not networks and (name := next(unused, None)):
        raise ValueError(f"{name}: only with a ControlNet or a T2I-Adapter, and this pipeline has none")
    if shown and not networks:
        raise ValueError(
            "control_image: this pipeline has no ControlNet; load it with controlnet=… or adapter=… (--controlnet, "
            "--adapter)"
        )
    counts = _counts(pipe, shown)
    if shown != sum(counts):
        raise ValueError(f"control_image: {shown} pictures; this pipeline has {_counted(pipe)}: one for each")
    _check_modes(pipe, request, counts)
    for name in SHARED:
        _each(request, name)
    for start, end in zip(*(_each(request, name) for name in WEIGHTS[1:]), strict=True):
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


def _counts(pipe: "DiffusionPipeline", shown: int) -> list[int]:
    """How many pictures each network is shown, of so many."""
    are_unions = [_is_union(pipe, name) for name in pipe.controls]
    more = max(0, shown - len(are_unions)) if sum(are_unions) == 1 else 0
    return [1 + more * is_union for is_union in are_unions]


def _check_modes(pipe: "DiffusionPipeline", request: Request, counts: Sequence[int]) -> None:
    modes, networks = request.control_mode, zip(pipe.controls, counts, strict=True)
    known = [
        getattr(pipe, name).config.num_control_type
        for name, count in networks
        if _is_union(pipe, name)
        for _ in range(count)
    ]
    if modes is not None and not known:
        raise ValueError("control_mode: only with a ControlNet-Union; the networks of this pipeline know one type each")
    if modes is None and known:
        raise ValueError(f"control_mode: a ControlNet-Union must be told the type of its picture, 0 to {known[0] - 1}")
    if len(modes or ()) != len(known):
        raise ValueError(f"control_mode: {len(modes)} types; a ControlNet-Union is shown {len(known)} pictures")
    for mode, types in zip(modes or (), known, strict=True):
        if mode >= types:
            raise ValueError(f"control_mode: {mode}; this ControlNet-Union has the types 0 to {types - 1}")


def _counted(pipe: "DiffusionPipeline") -> str:
    counts = {"ControlNet": len(pipe.controlnets), "T2I-Adapter": len(pipe.adapters)}
    return " and ".join(f"{count} {name}{'s' * (count > 1)}" for name, count in counts.items() if count)


def control_pictures(
    pipe: "DiffusionPipeline", requests: Sequence[Request], height: int, width: int
) -> list[np.ndarray]:
    """Each [B H W 3] in 0..1. Raises ValueError as `check_control`, and for requests of different numbers of them."""
    for request in requests:
        check_control(pipe, request)
    counts = {len(request.control_image or ()) for request in requests}
    if len(counts) > 1:
        raise ValueError("control_image: all pictures of a batch have as many")
    return [np.stack([_shown(request, k, width, height) for request in requests]) for k in range(*counts)]


def _shown(request: Request, k: int, width: int, height: int) -> np.ndarray:
    """[H W 3] what is made of control picture k."""
    name, picture = _each(request, "control_preprocessor")[k], request.control_image[k]
    box = box_of(request, width, height)
    outpaint = request.outpaint if request.image is not None and picture.size == request.image.size else None
    if name != INPAINT:
        return _preprocessed(picture, outpaint, box, name, width, height)
    known = _preprocessed(picture, outpaint, box, NONE, width, height)
    return np.where(mask_of(request, box, width, height) >= 0.5, -1, known)


@remembered(READ)
def _preprocessed(
    picture: Picture, outpaint: Box | None, box: Box | None, name: str, width: int, height: int
) -> np.ndarray:
    made = preprocessor(name)(pixels.resized(seen(picture, outpaint, box), width, height))
    return np.asarray(made, np.float32) / 255


def _each(request: Request, name: str) -> list[Any]:
    """The value of each picture. Raises ValueError for another number of them."""
    return spread(name, getattr(request, name), [len(request.control_image or ())], "control pictures")


def controls_of(
    pipe: "DiffusionPipeline",
    requests: Sequence[Request],
    shown: Sequence[np.ndarray],
    tables: Sequence[Table],
    rows: int,
) -> tuple[Control | None, dict[str, np.ndarray]]:
    """What the denoiser is given, and {"control": [R B K]}, each picture's weight in each row; (None, {}) without."""
    if not shown:
        return None, {}
    controlnets = pipe.controlnets
    pictures, features = _embedded(pipe, requests, shown)
    averaged = any(getattr(pipe, name).config.global_pool_conditions for name in controlnets[:1])
    guesses = column(requests, "guess_mode", False) | averaged
    weights = [_weights(request, len(table), rows) for request, table in zip(requests, tables, strict=True)]
    padded = parallel.pad(np.stack(weights), parallel.padded_size(len(requests), pipe.mesh.size))
    return Control(pictures, pipe.padded(guesses), features), {"control": np.moveaxis(padded, 0, 1)}


def _embedded(
    pipe: "DiffusionPipeline", requests: Sequence[Request], shown: Sequence[np.ndarray]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What the ControlNets make of the pictures, and what the T2I-Adapters make of them."""
    left, found, modes = iter(shown), [], 0
    for name, count in zip(pipe.controls, _counts(pipe, len(shown)), strict=True):
        padded = [pipe.padded(next(left)) for _ in range(count)]
        own = [programs.embed_control(pipe.mesh, *pipe.network(name), picture) for picture in padded]
        if _is_union(pipe, name):
            types = np.array([request.control_mode[modes : modes + count] for request in requests], np.int32)
            own, modes = [Typed(tuple(own), pipe.padded(types))], modes + count
        found += own
    controlnets = len(pipe.controlnets)
    return tuple(found[:controlnets]), tuple(found[controlnets:])


def _weights(request: Request, n: int, rows: int) -> np.ndarray:
    """[R K] float32: in row i of n a picture has its weight, or 0 where i / n < start or (i + 1) / n > end."""
    scale, start, end = (np.float64(_each(request, name)) for name in WEIGHTS)
    i = np.arange(rows)[:, None]
    return np.where((i / n < start) | ((i + 1) / n > end), 0, scale).astype(np.float32)
