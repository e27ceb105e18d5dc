"""What IP-Adapters are shown and how much they weigh, of requests."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from sdjax.inputs.clip_view import READ, clip_view
from sdjax.inputs.guidance import Guidance
from sdjax.pictures import pixels
from sdjax.pictures.picture import Picture
from sdjax.request import FIELDS, Request
from sdjax.runtime import programs
from sdjax.text.conditioning import Condition

if TYPE_CHECKING:
    from sdjax.diffusion_pipeline import DiffusionPipeline

BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.")


class Shown(NamedTuple):
    """What IP-Adapters are shown, on the host."""

    pictures: tuple[np.ndarray, ...]
    """for each [B n S S 3], as CLIP sees them"""
    masks: tuple[dict[str, np.ndarray], ...] | None
    """for each, by transformer block, [B n L] in its pixels; None: there are none"""


def prompts_by_image(arguments: Mapping[str, Any], adapters: int) -> dict[str, Any]:
    """The arguments of a call. With a single IP-Adapter a list has a picture, or a list of several, for each image;
    with several it is one value, as a list of scales is, and a list of such lists has several."""
    scales, found = arguments.get("ip_adapter_scale"), {}
    for name in ("ip_adapter_image", "ip_adapter_mask"):
        if not _is_listed(images := arguments.get(name)):
            continue
        if adapters == 1:
            found[name] = [[own] for own in images]
        elif not any(_is_listed(own) and any(map(_is_listed, own)) for own in images):
            found[name] = [images]
    if adapters > 1 and _is_listed(scales) and not any(map(_is_listed, scales)):
        found["ip_adapter_scale"] = [scales]
    return {**arguments, **found}


def _is_listed(value: Any) -> bool:
    return isinstance(value, list | tuple)


def check_ip_adapter(pipe: "DiffusionPipeline", request: Request) -> None:
    """Raises ValueError where the IP-Adapters have not pictures each, and a scale."""
    adapters, shown, scales = len(pipe.ip_adapters), len(request.ip_adapter_image or ()), len(request.ip_adapter_scale)
    if shown and not adapters:
        raise ValueError("ip_adapter_image: this pipeline has no IP-Adapter; load it with load_ip_adapter")
    if shown != adapters:
        raise ValueError(
            f"ip_adapter_image: pictures for {shown} IP-Adapters; this pipeline has {adapters}: give them to each, or "
            "call unload_ip_adapter"
        )
    if request.ip_adapter_mask is not None and _counts(request.ip_adapter_mask) != _counts(request.ip_adapter_image):
        raise ValueError("ip_adapter_mask: give one for each picture of ip_adapter_image, as these are given")
    for name in ("ip_adapter_mask", "ip_adapter_scale"):
        if not adapters and getattr(request, name) != FIELDS[name].default:
            raise ValueError(f"{name}: only with an IP-Adapter, see load_ip_adapter")
    if request.ip_adapter_mask is not None and request.padding_mask_crop is not None:
        raise ValueError("ip_adapter_mask: not with padding_mask_crop, whose region it would have to be cut to")
    if scales not in (1, adapters or 1):
        raise ValueError(f"ip_adapter_scale: {scales} values for {adapters} IP-Adapters")
    named = {name for one in request.ip_adapter_scale if isinstance(one, tuple) for name, _ in one}
    known = {name for names in _places(pipe) for name in names}
    if adapters and (unknown := named - known):
        raise ValueError(f"ip_adapter_scale: {min(unknown)!r} has no cross-attentions; {', '.join(sorted(known))} have")


def prompt_pictures(pipe: "DiffusionPipeline", requests: Sequence[Request], latents: tuple[int, int]) -> Shown:
    """What the IP-Adapters are shown, for latents of this height and width.

    Raises ValueError as `check_ip_adapter`, and for requests of different numbers of pictures or masks.
    """
    for request in requests:
        check_ip_adapter(pipe, request)
    if len({(_counts(r.ip_adapter_image), _counts(r.ip_adapter_mask)) for r in requests}) > 1:
        raise ValueError("ip_adapter_image, ip_adapter_mask: all pictures of a batch have as many")
    adapters = range(len(pipe.ip_adapters))
    size = pipe.image_encoder.config.image_size if adapters else 0
    pictures = tuple(
        np.stack([[clip_view(own, size) for own in r.ip_adapter_image[a]] for r in requests]) for a in adapters
    )
    if requests[0].ip_adapter_mask is None:
        return Shown(pictures, None)
    sizes = [tuple(-(-side // 2**level) for side in latents) for level in pipe.unet.config.levels]
    whole = tuple(side * pipe.vae.config.factor for side in latents)
    masks = tuple(
        [np.stack([[_mask(own, whole, one) for own in r.ip_adapter_mask[a]] for r in requests]) for one in sizes]
        for a in adapters
    )
    levels = _levels(pipe)
    return Shown(pictures, tuple({name: own[level] for name, level in levels.items()} for own in masks))


def _counts(pictures: tuple[tuple[Picture, ...], ...] | None) -> tuple[int, ...]:
    return tuple(map(len, pictures or ()))


def _levels(pipe: "DiffusionPipeline") -> dict[str, int]:
    """The level of each transformer block of the UNet, 0 is the finest."""
    last, found = pipe.unet.config.levels[-1], {}
    for name, _ in getattr(pipe, pipe.ip_adapters[0]).config.layers:
        match = BLOCK.match(name)
        found[name] = last if match is None else int(match[2]) if match[1] == "down" else last - int(match[2])
    return found


@lru_cache(READ)
def _mask(mask: Picture, whole: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """[h*w] a mask, cut at half grey at the size of the whole picture, made smaller."""
    white = pixels.grey(mask.rgb(), *whole[::-1])[..., 0] >= 0.5
    return pixels.interpolated(white, *size).reshape(-1)


def _places(pipe: "DiffusionPipeline") -> list[tuple[str, ...]]:
    """What scales may call each transformer block of the UNet, the narrowest first: up.block_0.1, up.block_0, up."""
    layers = getattr(pipe, pipe.ip_adapters[0]).config.layers if pipe.ip_adapters else ()
    found = [BLOCK.match(name) for name, _ in layers]
    return [(f"{m[1]}.block_{m[2]}.{m[3]}", f"{m[1]}.block_{m[2]}", m[1]) if m else ("mid",) for m in found]


def _scales(request: Request, adapters: int, places: Sequence[tuple[str, ...]]) -> list[list[float]]:
    """[A N] the scale of each IP-Adapter in each transformer block; in one that is not named it is 0."""
    made = []
    for scale in request.ip_adapter_scale * (adapters // len(request.ip_adapter_scale)):
        named = dict(scale) if isinstance(scale, tuple) else dict.fromkeys(("down", "mid", "up"), scale)
        made.append([next((named[name] for name in names if name in named), 0.0) for names in places])
    return made


def with_prompt_pictures(
    pipe: "DiffusionPipeline",
    requests: Sequence[Request],
    shown: Shown,
    guidance: Guidance,
    branches: tuple[Condition, ...],
) -> tuple[Condition, ...]:
    """The branches of the guidance, with what the IP-Adapters make of their pictures, or beside a negative prompt."""
    if not shown.pictures:
        return branches
    graphs, params = zip(*(pipe.network(name) for name in ("image_encoder", *pipe.ip_adapters)), strict=True)
    places = _places(pipe)
    scales = np.float32([_scales(request, len(shown.pictures), places) for request in requests])
    pictures, masks = (jax.tree.map(pipe.padded, own) for own in shown)
    arguments = (pipe.mesh, graphs, list(params), pictures, pipe.padded(scales), masks)
    prefixes = [branch.prefix for branch in guidance.branches]
    made = {prefix: programs.prompt_pictures(*arguments, is_negative=bool(prefix)) for prefix in set(prefixes)}
    return tuple(branch | {"pictures": made[prefix]} for prefix, branch in zip(prefixes, branches, strict=True))
