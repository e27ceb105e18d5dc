"""OpenAI's API of images, /v1/images and /v1/models; beside its fields those of a `Request`, such as seed."""

import asyncio
import base64
import contextlib
import io
import re
import time
from collections.abc import AsyncIterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image

from sdjax.fields import brief
from sdjax.pictures import metadata
from sdjax.request import FIELDS, kinds
from sdjax.request.kinds import json_or_text
from sdjax.request.values import flag, whole
from sdjax.serve import pictures
from sdjax.serve.catalog import Unknown
from sdjax.serve.errors import NO_MODEL, body_of
from sdjax.serve.events import event
from sdjax.serve.fields import Asked, Reader, schema
from sdjax.serve.orders import Drawing, Order, State, url
from sdjax.serve.studio import Failed, Studio, finished, parsed

API = "openai"
PREFIX = "/v1"
MOST = 10  # pictures
TICK = 0.05  # seconds between two looks at an order
OWN: Mapping[str, Any] = {
    "n": 1,
    "size": "auto",
    "quality": "auto",
    "background": "auto",
    "output_format": "png",
    "output_compression": None,
    "partial_images": 0,
    "stream": False,
    "response_format": "b64_json",
    "user": None,
    "safety_identifier": None,
    "moderation": "auto",
    "style": None,
    "input_fidelity": None,
}
"""Fields and their defaults"""
CHOICES = {
    "quality": ("auto", "standard"),
    "background": ("auto", "opaque"),
    "output_format": ("png", "jpeg", "webp"),
    "response_format": ("b64_json", "url"),
    "moderation": ("auto", "low"),
}
TEXTS = ("size", "model", "user", "safety_identifier")
WITHOUT = ("style", "input_fidelity")
"""What is not supported"""


class Answer(NamedTuple):
    """How pictures are sent."""

    kind: str
    """image_generation or image_edit"""
    format: str
    compression: int | None
    as_url: bool
    partial: int


def router(studio: Studio) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix=PREFIX, tags=["OpenAI"])

    @routes.post("/images/generations", response_model=None, openapi_extra=_content("application/json", studio))
    async def generations(http: HTTPRequest) -> Any:
        """Pictures of a prompt; waits for them, or streams partial ones."""
        return await _answered(studio, http, parsed(await http.body()), "image_generation")

    @routes.post("/images/edits", response_model=None, openapi_extra=_content("multipart/form-data", studio))
    async def edits(http: HTTPRequest) -> Any:
        """Pictures of a prompt and a picture, anew where the mask is transparent."""
        return await _answered(studio, http, await _form(http), "image_edit")

    @routes.get("/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name) for name in studio.models.names]}

    @routes.get("/models/{id:path}", response_model=None)
    def model(id: str) -> Any:
        try:
            return _model(studio.models.name(id))
        except Unknown as error:
            return JSONResponse(body_of(PREFIX + "/", 404, str(error), NO_MODEL), 404)

    return routes


def _content(kind: str, studio: Studio) -> dict[str, Any]:
    known = schema(studio.limits)
    del known["properties"]["count"]
    known["properties"] |= {
        "n": {"type": "integer", "minimum": 1, "maximum": MOST, "default": 1},
        "size": {"type": "string", "default": "auto", "description": "WIDTHxHEIGHT"},
        "output_compression": {"type": "integer", "minimum": 0, "maximum": 100},
        "partial_images": {"type": "integer", "minimum": 0, "maximum": 3, "default": 0},
        "stream": {"type": "boolean", "default": False},
        "user": {"type": "string"},
        **{name: {"type": "string", "enum": list(values)} for name, values in CHOICES.items()},
    }
    if kind != "application/json":
        file = {"type": "string", "format": "binary"}
        known["properties"] |= {"image": file, "mask": file}
        known["required"] = ["prompt", "image"]
    return {"requestBody": {"required": True, "content": {kind: {"schema": known}}}}


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "sdjax"}


async def _form(http: HTTPRequest) -> dict[str, Any]:
    """The values of a form as of JSON; files as bytes."""
    if not http.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ValueError("body: must be multipart/form-data")
    given: dict[str, Any] = {}
    async with http.form(max_files=4, max_fields=100, max_part_size=2**20) as form:
        for key, value in form.multi_items():
            name = key.removesuffix("[]")
            if name in given:
                raise ValueError(f"{name[:80]}: is there twice; several are not supported")
            given[name] = await value.read() if hasattr(value, "read") else _parsed(name, value)
    return given


def _parsed(name: str, text: str) -> Any:
    """The value of a text of a form."""
    if name in TEXTS:
        return text
    spec = FIELDS.get(name)
    return json_or_text(text) if spec is None or spec.kind is kinds.SEED else spec.kind.parse(text)


async def _answered(studio: Studio, http: HTTPRequest, given: Mapping[str, Any], kind: str) -> Any:
    with studio.reading() as reader:
        asked, answer, streams = await asyncio.to_thread(_read, given, kind, reader)
        order = await studio.take(asked, API, http)
    if streams:
        stream = _events(studio, order, answer)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    await finished(order, http)
    done = [drawing for drawing in order.drawings if drawing.state is State.done]
    data = await asyncio.to_thread(lambda: [_sent(studio, http, drawing, answer) for drawing in done])
    return {"created": int(order.created), "data": data, **_said(_size_of(done[0]) if done else "auto", answer)}


def _read(given: Mapping[str, Any], kind: str, reader: Reader) -> tuple[Asked, Answer, bool]:
    """What is asked for, how it is sent, and whether as a stream. Raises ValueError that begins with the field."""
    own = {**OWN, **{name: value for name, value in given.items() if name in OWN and value is not None}}
    rest = {name: value for name, value in given.items() if name not in OWN}
    if "count" in rest:
        raise ValueError("count: unknown; here it is n")
    for name, choices in CHOICES.items():
        if own[name] not in choices:
            raise ValueError(f"{name}: {brief(own[name])} is not supported here; {', '.join(choices)} are")
    for name in WITHOUT:
        if own[name] is not None:
            raise ValueError(f"{name}: is not supported here")
    rest["count"] = whole("n", own["n"], 1, MOST)
    if own["size"] != "auto":
        rest |= dict(zip(("width", "height"), _size(own["size"]), strict=True))
    if kind == "image_edit":
        rest |= _edited(rest, reader)
        rest.pop("mask", None)
    compression = own["output_compression"]
    if compression is not None:
        whole("output_compression", compression, 0, 100)
        if own["output_format"] == "png" and compression < 100:
            raise ValueError("output_compression: not of png; give output_format jpeg or webp")
    partial = whole("partial_images", own["partial_images"], 0, 3)
    answer = Answer(kind, own["output_format"], compression, own["response_format"] == "url", partial)
    return reader.asked(rest, {"count": "n"}), answer, flag("stream", own["stream"])


def _size(value: Any) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", value, re.ASCII) if isinstance(value, str) else None
    if not match:
        raise ValueError(f"size: must be WIDTHxHEIGHT or auto, not {brief(value)}")
    return int(match[1]), int(match[2])


def _edited(given: Mapping[str, Any], reader: Reader) -> dict[str, Any]:
    """The picture, and the mask: white where it is transparent."""
    image, mask = given.get("image"), given.get("mask")
    if not isinstance(image, bytes):
        raise ValueError("image: must be a file")
    found = {"image": pictures.of_image("image", reader.opened("image", image))}
    if mask is None:
        return found
    if not isinstance(mask, bytes):
        raise ValueError("mask: must be a file")
    return found | {"mask_image": pictures.of_image("mask", _transparent(reader.opened("mask", mask)))}


def _transparent(image: Image.Image) -> Image.Image:
    """White where a picture is transparent, else black."""
    try:
        if not image.has_transparency_data:
            raise ValueError("mask: has no transparency, which says where the picture is made anew")
        return image.convert("RGBA").getchannel("A").point(lambda alpha: 255 * (alpha < 128))
    except ValueError:
        raise
    except Exception:  # of many types, by codec
        raise ValueError("mask: is damaged") from None


def _sent(studio: Studio, http: HTTPRequest, drawing: Drawing, answer: Answer) -> dict[str, Any]:
    if answer.as_url:
        return {"url": str(http.base_url).rstrip("/") + url(drawing.name)}
    return {"b64_json": _base64(studio, drawing, answer)}


def _base64(studio: Studio, drawing: Drawing, answer: Answer) -> str:
    """The file of a picture in the format that is asked for."""
    file = studio.file(drawing)
    if answer.format != "png":
        settings = metadata.read_settings(io.BytesIO(file))
        image = Image.open(io.BytesIO(file))
        file = metadata.encode(image, settings, answer.format, answer.compression)
    return base64.b64encode(file).decode()


def _said(size: str, answer: Answer) -> dict[str, Any]:
    """What an answer says of its pictures."""
    return {"size": size, "quality": "auto", "background": "opaque", "output_format": answer.format, "usage": USAGE}


def _size_of(drawing: Drawing) -> str:
    """Of a picture that is done."""
    return f"{drawing.settings['width']}x{drawing.settings['height']}"


USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}
"""Nothing is charged"""


async def _events(studio: Studio, order: Order, answer: Answer) -> AsyncIterator[str]:
    """Partial pictures, and each when it is done; an order whose client goes is cancelled."""
    sent, seen, done = dict.fromkeys(range(len(order.drawings)), 0), dict[int, int](), set[int]()
    with order.watched() as changed, contextlib.ExitStack() as left:
        left.callback(order.cancel)
        while True:
            has_ended = order.ended.is_set()
            for drawing in order.drawings:
                if drawing.state is State.done and drawing.index not in done:
                    done.add(drawing.index)
                    yield await asyncio.to_thread(_completed, studio, drawing, answer)
                elif drawing.error and drawing.index not in done:
                    done.add(drawing.index)
                    yield event("error", body_of(PREFIX + "/", 400 if drawing.is_refused else 500, drawing.error))
                elif image := None if drawing.index in done else _partial(drawing, seen, sent[drawing.index], answer):
                    data = await asyncio.to_thread(_preview, image, answer)
                    number = {"partial_image_index": sent[drawing.index]}
                    sent[drawing.index] += 1
                    size = f"{image.width}x{image.height}"
                    yield _event(f"{answer.kind}.partial_image", data, size, answer, number)
            if has_ended:
                return
            await changed(TICK)


def _completed(studio: Studio, drawing: Drawing, answer: Answer) -> str:
    try:
        data = _base64(studio, drawing, answer)
    except Failed as error:
        return event("error", body_of(PREFIX + "/", 500, str(error)))
    return _event(f"{answer.kind}.completed", data, _size_of(drawing), answer)


def _partial(drawing: Drawing, seen: dict[int, int], sent: int, answer: Answer) -> Image.Image | None:
    """A new preview, where it is time for the next one: they share the rows."""
    if sent == answer.partial:
        return None
    drawing.watch()
    is_time = drawing.row * (answer.partial + 1) >= drawing.rows * (sent + 1)
    shown = drawing.shown
    if not is_time or not shown or seen.get(drawing.index) == shown[0]:
        return None
    seen[drawing.index] = shown[0]
    return shown[1]


def _preview(image: Image.Image, answer: Answer) -> str:
    return base64.b64encode(pictures.file(image, format=answer.format)).decode()


def _event(name: str, data: str, size: str, answer: Answer, more: Mapping[str, Any] = MappingProxyType({})) -> str:
    known = {"type": name, "b64_json": data, "created_at": int(time.time())}
    return event(name, {**known, **_said(size, answer), **more})
