"""sdjax's own API: requests as JSON, server-sent events with previews, the gallery."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Response
from fastapi import Request as HTTPRequest
from fastapi.responses import StreamingResponse

from sdjax.pictures.web_ui import SAMPLERS
from sdjax.request import FIELDS
from sdjax.request.values import UPSCALERS
from sdjax.sampling import NAMES
from sdjax.serve import settings
from sdjax.serve.events import event
from sdjax.serve.fields import described, schema
from sdjax.serve.models import Loaded
from sdjax.serve.networks import own_names
from sdjax.serve.orders import ENDED, Drawing, Order, State, preview_urls, url
from sdjax.serve.studio import Studio, parsed

TICK = 0.2  # seconds between two looks at an order
ALIVE = 15.0  # seconds after which a comment says that the connection is there
PAGE_SIZE = 50  # pictures
API = "native"
EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


def router(studio: Studio) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["sdjax"])
    body = {"required": True, "content": {"application/json": {"schema": schema(studio.limits)}}}
    png = {"required": True, "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}

    @routes.get("/capabilities")
    async def capabilities() -> dict[str, Any]:
        """What a request may have, and what there is."""
        return _capabilities(studio, await studio.models.get())

    @routes.post("/requests", status_code=202, openapi_extra={"requestBody": body})
    async def post(http: HTTPRequest) -> dict[str, Any]:
        """Asks for pictures: the fields of a request, and `count`. Answers before they are made."""
        given = parsed(await http.body())
        with studio.reading() as reader:
            asked = await asyncio.to_thread(reader.asked, given)
            order = await studio.take(asked, API, http)
        return {"id": order.id, "seeds": asked.seeds}

    @routes.get("/requests")
    def every() -> list[dict[str, Any]]:
        """All that were not forgotten, the newest last."""
        return [order.json() for order in studio.orders.all]

    @routes.get("/requests/{id}")
    def one(id: str) -> dict[str, Any]:
        """How far it is."""
        return _order(studio, id).json()

    @routes.delete("/requests/{id}", status_code=204)
    def cancel(id: str) -> None:
        """Cancels what is not done."""
        _order(studio, id).cancel()

    @routes.get("/requests/{id}/events", response_class=StreamingResponse, responses=EVENTS)
    def events(id: str, previews: bool = False) -> StreamingResponse:
        """Server-sent events: progress, preview, picture, and at last done or error."""
        stream = _events(_order(studio, id), previews)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    @routes.get("/pictures")
    def gallery(
        page: Annotated[int, Query(ge=0, le=10**6)] = 0, size: Annotated[int, Query(ge=1, le=200)] = PAGE_SIZE
    ) -> dict[str, Any]:
        """The pictures, newest first, with their settings."""
        found, total = studio.gallery.page(page * size, size)
        listed = [{"name": k.name, "url": url(k.name), "settings": k.settings, "time": k.time} for k in found]
        return {"pictures": listed, "total": total, "page": page, "size": size}

    @routes.get("/pictures/{name}", response_class=Response, responses={200: {"content": {"image/png": {}}}})
    def picture(name: str, http: HTTPRequest) -> Response:
        """A PNG, with its settings in it."""
        data = studio.gallery.file(name)
        if data is None:
            raise HTTPException(404, "there is no such picture")
        tag = f'"{hashlib.sha256(data).hexdigest()}"'
        headers = {"Cache-Control": "private, no-cache", "ETag": tag}  # a name may be that of another one later
        if tag in http.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(data, media_type="image/png", headers=headers)

    @routes.post("/settings", openapi_extra={"requestBody": png})
    async def read_settings(http: HTTPRequest) -> dict[str, Any]:
        """The settings in a picture, as a request takes them."""
        data = await _file(http)
        return await asyncio.to_thread(settings.carried, "picture", data, studio.limits.source_pixels)

    return routes


async def _file(http: HTTPRequest) -> bytes:
    """The bytes of a body, or of the only file of a form."""
    if not http.headers.get("content-type", "").startswith("multipart/"):
        return await http.body()
    async with http.form(max_files=1, max_fields=8) as form:
        files = [value for value in form.values() if hasattr(value, "read")]
        if len(files) != 1:
            raise ValueError("body: must have one file")
        return await files[0].read()


def _order(studio: Studio, id: str) -> Order:
    order = studio.orders.get(id)
    if order is None:
        raise HTTPException(404, "there is no such request")
    return order


def _capabilities(studio: Studio, loaded: Loaded) -> dict[str, Any]:
    limits = studio.limits
    known = {
        "pixels": limits.pixels,
        "steps": limits.steps,
        "count": limits.count,
        "text": limits.text,
        "source_pixels": limits.source_pixels,
        "body": limits.body,
    }
    return {
        "model": loaded.name,
        "models": studio.models.names,
        "fields": [described(spec) for spec in FIELDS.values()],
        "samplers": [{"name": name, "web_ui": SAMPLERS.get(name)} for name in NAMES],
        "loras": list(studio.loras.paths),
        "embeddings": list(studio.embeddings.paths),
        "controlnets": [*own_names(loaded.pipe), *studio.controlnets.paths],
        "upscalers": list(studio.upscalers.catalog.paths),
        **loaded.defaults,
        "steps": FIELDS["num_inference_steps"].default,
        "limits": known,
        "controls": len(loaded.pipe.controls),
        "hires_upscalers": [name for name in UPSCALERS if name != "model" or loaded.pipe.upscaler is not None],
    }


async def _events(order: Order, previews: bool) -> AsyncIterator[str]:
    loop = asyncio.get_running_loop()
    last, seen, done, spoken = None, dict[int, int](), set[int](), loop.time()
    with order.watched() as changed:
        while True:
            has_ended, now = order.ended.is_set(), order.json()
            found = [event("progress", now)] if now != last else []
            last = now
            if previews:
                shown = await asyncio.to_thread(preview_urls, order.drawings, seen)
                found += [event("preview", one) for one in shown]
            fresh = [drawing for drawing in order.drawings if drawing.index not in done and drawing.state in ENDED]
            done |= {drawing.index for drawing in fresh}
            found += [said for drawing in fresh if (said := _ended(drawing))]
            if found:
                yield "".join(found)
                spoken = loop.time()
            elif loop.time() - spoken > ALIVE:
                yield ": alive\n\n"
                spoken = loop.time()
            if has_ended:
                yield event("done", now)
                return
            await changed(TICK)


def _ended(drawing: Drawing) -> str | None:
    if drawing.state is State.done:
        known = {"index": drawing.index, "seed": drawing.seed, "url": url(drawing.name), "settings": drawing.settings}
        return event("picture", known)
    return event("error", {"index": drawing.index, "error": drawing.error}) if drawing.error else None
