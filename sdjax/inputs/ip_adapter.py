"""What IP-Adapters are shown and how much they weigh, of requests."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from sdjax.inputs.clip_view import READ, clip_view
from sdjax.inputs.guidance import Guidance
from sdjax.pictures import pixels
from sdjax.pictures.picture import Picture, remembered
from sdjax.request import FIELDS, Request, spread
from sdjax.runtime import programs
from sdjax.text import encoding
from sdjax.text.conditioning import PREFIXES, Condition

if TYPE_CHECKING:
    from sdjax.diffusion_pipeline import DiffusionPipeline

BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.")
EMBEDS = "ip_adapter_image_embeds"


class Shown(NamedTuple):
    """What IP-Adapters are shown, on the host."""

    pictures: tuple[np.ndarray, ...]
    """for each [B n S S 3], as CLIP sees them; none where embeddings are given"""
    embeds: Mapping[str, list[np.ndarray]]
    """by the prefix of their branch, for each [B n P] or [B n T P]"""
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


def check_ip_adapter(
    pipe: "DiffusionPipeline", request: Request, image_embeds: Sequence[np.ndarray] | None = None
) -> None:
    """Raises ValueError where the IP-Adapters have not pictures, or embeddings of these, each, and a scale."""
    adapters, name, counts = len(pipe.ip_adapters), "ip_adapter_image", _counts(request.ip_adapter_image)
    if image_embeds is not None:
        if counts:
            raise ValueError("ip_adapter_image: not with ip_adapter_image_embeds, which stand for it")
        name, counts = EMBEDS, tuple(own.shape[1] for own in image_embeds)
    if counts and not adapters:
        raise ValueError(f"{name}: this pipeline has no IP-Adapter; load it with load_ip_adapter, or --ip-adapter")
    if len(counts) != adapters:
        raise ValueError(
            f"{name}: pictures for {len(counts)} IP-Adapters; this pipeline has {adapters}: give them to each, or call "
            "unload_ip_adapter"
        )
    if counts and image_embeds is None and any(getattr(pipe, own).config.kind == "face" for own in pipe.ip_adapters):
        raise ValueError(
            "ip_adapter_image: FaceID sees embeddings that insightface makes of faces; give ip_adapter_image_embeds"
        )
    if counts and image_embeds is None and pipe.image_encoder is None:
        raise ValueError("ip_adapter_image: this pipeline has no image encoder; give ip_adapter_image_embeds")
    if request.ip_adapter_mask is not None and _counts(request.ip_adapter_mask) != counts:
        raise ValueError(f"ip_adapter_mask: give one for each picture of {name}, as these are given")
    for other in ("ip_adapter_mask", "ip_adapter_scale"):
        if not adapters and getattr(request, other) != FIELDS[other].default:
            raise ValueError(f"{other}: only with an IP-Adapter, see load_ip_adapter")
    if request.ip_adapter_mask is not None and request.padding_mask_crop is not None:
        raise ValueError("ip_adapter_mask: not with padding_mask_crop, whose region it would have to be cut to")
    _scale_of_each(pipe, request)
    named = {name for one in request.ip_adapter_scale if isinstance(one, tuple) for name, _ in one}
    known = {name for names in _places(pipe) for name in names}
    if adapters and (unknown := named - known):
        raise ValueError(f"ip_adapter_scale: {min(unknown)!r} has no cross-attentions; {', '.join(sorted(known))} have")


def _scale_of_each(pipe: "DiffusionPipeline", request: Request) -> list[Any]:
    """Raises ValueError for another number of them than there are IP-Adapters."""
    return spread("ip_adapter_scale", request.ip_adapter_scale, [len(pipe.ip_adapters)], "IP-Adapters")


def prompt_pictures(
    pipe: "DiffusionPipeline",
    requests: Sequence[Request],
    image_embeds: Sequence[Any] | None,
    guidance: Guidance,
    latents: tuple[int, int],
) -> Shown:
    """What the IP-Adapters are shown, for latents of this height and width.

    Raises ValueError as `check_ip_adapter` and `embeds_of`, and for requests of different numbers of pictures or masks.
    """
    given = None if image_embeds is None else _checked(pipe, image_embeds)
    for request in requests:
        check_ip_adapter(pipe, request, given)
    if len({(_counts(r.ip_adapter_image), _counts(r.ip_adapter_mask)) for r in requests}) > 1:
        raise ValueError("ip_adapter_image, ip_adapter_mask: all pictures of a batch have as many")
    adapters = range(len(pipe.ip_adapters))
    pictures, embeds = (), {}
    if given is not None:
        embeds = embeds_of(given, len(requests), is_guided=any(branch.prefix for branch in guidance.branches))
    elif adapters:
        pictures = tuple(_as_seen(pipe, [request.ip_adapter_image[a] for request in requests]) for a in adapters)
    if requests[0].ip_adapter_mask is None:
        return Shown(pictures, embeds, None)
    sizes = [tuple(-(-side // 2**level) for side in latents) for level in pipe.unet.config.levels]
    whole = tuple(side * pipe.vae.config.factor for side in latents)
    masks = tuple(
        [np.stack([[_mask(own, whole, one) for own in r.ip_adapter_mask[a]] for r in requests]) for one in sizes]
        for a in adapters
    )
    levels = _levels(pipe)
    return Shown(pictures, embeds, tuple({name: own[level] for name, level in levels.items()} for own in masks))


def _counts(pictures: tuple[tuple[Picture, ...], ...] | None) -> tuple[int, ...]:
    return tuple(map(len, pictures or ()))


def _levels(pipe: "DiffusionPipeline") -> dict[str, int]:
    """The level of each transformer block of the UNet, 0 is the finest."""
    last, found = pipe.unet.config.levels[-1], {}
    for name, _ in getattr(pipe, pipe.ip_adapters[0]).config.layers:
        match = BLOCK.match(name)
        found[name] = last if match is None else int(match[2]) if match[1] == "down" else last - int(match[2])
    return found


@remembered(READ)
def _mask(mask: Picture, whole: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """[h*w] a mask, cut at half grey at the size of the whole picture, made smaller."""
    white = pixels.grey(mask.rgb(), *whole[::-1])[..., 0] >= 0.5
    return pixels.interpolated(white, *size).reshape(-1)


def _places(pipe: "DiffusionPipeline") -> list[tuple[str, ...]]:
    """What scales may call each transformer block of the UNet, the narrowest first: up.block_0.1, up.block_0, up."""
    layers = getattr(pipe, pipe.ip_adapters[0]).config.layers if pipe.ip_adapters else ()
    found = [BLOCK.match(name) for name, _ in layers]
    return [(f"{m[1]}.block_{m[2]}.{m[3]}", f"{m[1]}.block_{m[2]}", m[1]) if m else ("mid",) for m in found]


def _scales(pipe: "DiffusionPipeline", request: Request, places: Sequence[tuple[str, ...]]) -> list[list[float]]:
    """[A N] the scale of each IP-Adapter in each transformer block; in one that is not named it is 0."""
    made = []
    for scale in _scale_of_each(pipe, request):
        named = dict(scale) if isinstance(scale, tuple) else dict.fromkeys(("down", "mid", "up"), scale)
        made.append([next((named[name] for name in names if name in named), 0.0) for names in places])
    return made


def _as_seen(pipe: "DiffusionPipeline", pictures: Sequence[Sequence[Picture]]) -> np.ndarray:
    """[B n S S 3] n pictures of each image as CLIP sees them."""
    size = pipe.image_encoder.config.image_size
    return np.stack([[clip_view(own, size) for own in each] for each in pictures])


def with_prompt_pictures(
    pipe: "DiffusionPipeline",
    requests: Sequence[Request],
    shown: Shown,
    guidance: Guidance,
    branches: tuple[Condition, ...],
) -> tuple[Condition, ...]:
    """The branches of the guidance, with what the IP-Adapters make of their pictures, or beside a negative prompt."""
    if not pipe.ip_adapters:
        return branches
    graphs, params = zip(*(pipe.network(name) for name in pipe.ip_adapters), strict=True)
    places = _places(pipe)
    scales = pipe.padded(np.float32([_scales(pipe, request, places) for request in requests]))
    masks = jax.tree.map(pipe.padded, shown.masks)
    prefixes, made = [branch.prefix for branch in guidance.branches], {}
    for prefix in set(prefixes):
        seen = tuple(map(pipe.padded, shown.embeds[prefix] if shown.embeds else _seen_by(pipe, shown.pictures, prefix)))
        made[prefix] = programs.prompt_pictures(pipe.mesh, graphs, list(params), seen, scales, masks)
    return tuple(branch | {"pictures": made[prefix]} for prefix, branch in zip(prefixes, branches, strict=True))


def _seen_by(pipe: "DiffusionPipeline", pictures: Sequence[np.ndarray], prefix: str) -> list[jax.Array]:
    """What the image encoder makes of the pictures [B n S S 3] of each IP-Adapter, beside the prompt of this prefix."""
    return [
        programs.see_pictures(
            pipe.mesh,
            *pipe.network("image_encoder"),
            pipe.padded(own),
            takes_states=getattr(pipe, name).config.takes_states,
            is_negative=bool(prefix),
        )
        for name, own in zip(pipe.ip_adapters, pictures, strict=True)
    ]


def image_embeds(pipe: "DiffusionPipeline", request: Request, *, is_guided: bool) -> list[np.ndarray]:
    """For each IP-Adapter what `embeds_of` takes, of the pictures of a request. Raises ValueError where there are none
    for each."""
    check_ip_adapter(pipe, request)
    pictures = [_as_seen(pipe, [own]) for own in request.ip_adapter_image or ()]
    sides = [_seen_by(pipe, pictures, prefix) for prefix in (PREFIXES if is_guided else PREFIXES[-1:])]
    return [np.concatenate([np.asarray(side[:1], np.float32) for side in own]) for own in zip(*sides, strict=True)]


def embeds_of(given: Sequence[np.ndarray], images: int, *, is_guided: bool) -> dict[str, list[np.ndarray]]:
    """By the prefix of their branch, [B n P] or [B n T P] for each IP-Adapter, of its embeddings as PyTorch diffusers
    has them: [2 n ...], beside the negative prompt and beside the prompt, or [1 n ...] without guidance; or so many for
    each image, those beside the negative prompt first. Raises ValueError for another number of them."""
    prefixes = PREFIXES if is_guided else PREFIXES[-1:]
    found: dict[str, list[np.ndarray]] = {prefix: [] for prefix in prefixes}
    for own in given:
        if len(own) % len(prefixes):
            raise ValueError(f"{EMBEDS}: {len(own)} of them; with guidance, as many beside the negative prompt first")
        if not is_guided and len(own) > 1 and not own[: len(own) // 2].any():
            raise ValueError(f"{EMBEDS}: the first half is zeros, of a negative prompt, and there is no guidance")
        for prefix, half in zip(prefixes, np.split(own, len(prefixes)), strict=True):
            found[prefix].append(np.stack(spread(EMBEDS, half, [images], "images")))
    return found


def _checked(pipe: "DiffusionPipeline", given: Sequence[Any]) -> list[np.ndarray]:
    """As arrays. Raises ValueError for other shapes than those of the IP-Adapters."""
    configs = [getattr(pipe, name).config for name in pipe.ip_adapters]
    if len(given) != len(configs):
        raise ValueError(f"{EMBEDS}: of {len(given)} IP-Adapters; this pipeline has {len(configs)}")
    shapes = [(None,) * (3 if config.takes_states else 2) + (config.image_channels,) for config in configs]
    given = [_without_axis(own, shape) for own, shape in zip(given, shapes, strict=True)]
    arrays = [encoding.array(EMBEDS, own, shape) for own, shape in zip(given, shapes, strict=True)]
    if not all(own.shape[1] for own in arrays):
        raise ValueError(f"{EMBEDS}: of no picture; give [2, pictures, …] for each IP-Adapter")
    return arrays


def _without_axis(given: Any, shape: tuple[int | None, ...]) -> Any:
    """Embeddings of faces are [2 n 1 P] as well, in PyTorch diffusers."""
    has_more = getattr(given, "ndim", 0) == len(shape) + 1 and given.shape[-2] == 1
    return given[..., 0, :] if has_more else given
