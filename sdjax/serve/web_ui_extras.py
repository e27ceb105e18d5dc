"""The web UI's /extra-single-image: a picture made larger by Pillow or by an ESRGAN, without the model."""

import asyncio
import base64
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastapi import HTTPException
from fastapi import Request as HTTPRequest
from PIL import Image

from sdjax.fields import brief
from sdjax.pipeline import StableDiffusionPipeline
from sdjax.request.values import finite, flag, whole
from sdjax.serve import pictures
from sdjax.serve.errors import GONE
from sdjax.serve.fields import Reader
from sdjax.serve.studio import Ending, Studio
from sdjax.serve.web_ui_bodies import MODEL_UPSCALER

RESIZED = {
    "None": Image.Resampling.BICUBIC,
    "Lanczos": Image.Resampling.LANCZOS,
    "Nearest": Image.Resampling.NEAREST,
}
"""Upscalers that are Pillow's, and how"""
NOT_SUPPORTED = ("gfpgan_visibility", "codeformer_visibility", "extras_upscaler_2_visibility")


class _Wanted(NamedTuple):
    """What is asked for."""

    image: Image.Image
    upscaler: str
    size: tuple[int, int]
    """before it is cut"""
    cut: tuple[int, int]


def upscaler_names(studio: Studio, pipe: StableDiffusionPipeline) -> list[str]:
    """Of all upscalers."""
    return [*RESIZED, *[MODEL_UPSCALER] * (pipe.upscaler is not None), *studio.upscalers.catalog.paths]


async def larger(studio: Studio, given: Mapping[str, Any], reader: Reader, http: HTTPRequest) -> dict[str, Any]:
    """The answer. Raises ValueError that begins with the field."""
    pipe = (await studio.models.get()).pipe
    wanted = await asyncio.to_thread(_wanted, given, reader, upscaler_names(studio, pipe))
    image, name = wanted.image, wanted.upscaler

    async def check() -> None:
        if studio.is_ending:
            raise Ending("the server ends")
        if await http.is_disconnected():
            raise HTTPException(GONE, "the client has gone")

    if name not in RESIZED:
        network = pipe.upscaler if name == MODEL_UPSCALER and pipe.upscaler is not None else name
        image = await studio.upscalers.larger(network, image, wanted.size, check)
    return {"html_info": "", "image": await asyncio.to_thread(_file, image, wanted)}


def _wanted(given: Mapping[str, Any], reader: Reader, names: list[str]) -> _Wanted:
    for name in NOT_SUPPORTED:
        if given.get(name):
            raise ValueError(f"{name}: is not supported here; give 0")
    upscaler = given.get("upscaler_1") or "None"
    if upscaler not in names:
        raise ValueError(f"upscaler_1: {brief(upscaler)} is not supported here; {', '.join(names)} are")
    image = reader.sent("image", given.get("image")).rgb()
    size, cut = _sizes(given, image.size)
    most = reader.limits.source_pixels
    if math.prod(size) > most:
        raise ValueError(f"upscaling_resize: to {size[0]}x{size[1]}, more than {most:,} pixels")
    return _Wanted(image, upscaler, size, cut)


def _sizes(given: Mapping[str, Any], size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """What the picture is resized to, and what is cut out of its middle."""
    if not whole("resize_mode", given.get("resize_mode", 0), 0, 1):
        scale = finite("upscaling_resize", given.get("upscaling_resize", 2), 0.01, 16)
        resized = tuple(max(1, round(side * scale)) for side in size)
        return resized, resized
    names = ("upscaling_resize_w", "upscaling_resize_h")
    cut = tuple(whole(name, given.get(name, 512), 1, 16384) for name in names)
    scale = max(one / own for one, own in zip(cut, size, strict=True))
    resized = tuple(max(side, round(own * scale)) for side, own in zip(cut, size, strict=True))
    return resized, cut if flag("upscaling_crop", given.get("upscaling_crop", True)) else resized


def _file(image: Image.Image, wanted: _Wanted) -> str:
    """As base64."""
    if image.size != wanted.size:
        image = image.resize(wanted.size, RESIZED.get(wanted.upscaler, Image.Resampling.LANCZOS))
    left, top = ((side - own) // 2 for side, own in zip(wanted.size, wanted.cut, strict=True))
    image = image.crop((left, top, left + wanted.cut[0], top + wanted.cut[1]))
    return base64.b64encode(pictures.file(image, format="PNG")).decode()
