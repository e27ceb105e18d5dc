"""The API of AUTOMATIC1111's Stable Diffusion web UI, /sdapi/v1."""

import asyncio
import base64
import io
import json
import math
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from importlib.metadata import version
from typing import Any

import jax
from fastapi import APIRouter
from fastapi import Request as HTTPRequest

from sdjax.inputs.tasks import EDIT, task
from sdjax.pictures import metadata
from sdjax.pictures.web_ui import SAMPLERS, SCHEDULES
from sdjax.request.values import flag
from sdjax.runtime import host
from sdjax.serve import pictures, settings
from sdjax.serve.orders import ENDED, Drawing, Order, State
from sdjax.serve.studio import Studio, finished, parsed
from sdjax.serve.web_ui_bodies import (
    IMG2IMG,
    TXT2IMG,
    img2img,
    model_name,
    of_settings,
    txt2img,
)
from sdjax.serve.web_ui_controlnet import SCRIPT
from sdjax.serve.web_ui_extras import larger, upscaler_names

API = "web_ui"
PREFIX = "/sdapi/v1"
EMPTY: Mapping[str, Any] = {
    "/sd-vae": [],
    "/prompt-styles": [],
    "/hypernetworks": [],
    "/face-restorers": [],
    "/realesrgan-models": [],
    "/cmd-flags": {},
    "/scripts": {"txt2img": [SCRIPT], "img2img": [SCRIPT]},
    "/script-info": [],
    "/latent-upscale-modes": [{"name": "Latent"}],
}
"""What is the same always"""
WITHOUT_EFFECT = ("/refresh-checkpoints", "/refresh-loras", "/refresh-embeddings", "/refresh-vae")
"""Lists are read again by themselves"""
KEPT = ("CLIP_stop_at_last_layers", "randn_source")
"""Options that later requests obey"""


def router(studio: Studio) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix=PREFIX, tags=["web UI"])
    options: dict[str, Any] = {"CLIP_stop_at_last_layers": 1}

    @routes.post("/txt2img", openapi_extra=_body(TXT2IMG))
    async def from_text(http: HTTPRequest) -> dict[str, Any]:
        """Pictures of a prompt; waits for them."""
        given = parsed(await http.body())
        with studio.reading() as reader:
            order = await studio.take(await asyncio.to_thread(txt2img, given, options, reader), API, http)
        return await _made(studio, order, http, _known(TXT2IMG, given))

    @routes.post("/img2img", openapi_extra=_body(IMG2IMG))
    async def from_picture(http: HTTPRequest) -> dict[str, Any]:
        """Pictures of a prompt and a picture; waits for them."""
        given = parsed(await http.body())
        is_edit = task((await studio.models.get()).pipe) == EDIT
        with studio.reading() as reader:
            asked = await asyncio.to_thread(img2img, given, options, reader, takes_scale=is_edit)
            order = await studio.take(asked, API, http)
        shown = _known(IMG2IMG, given) | {"mask": None}
        if not shown["include_init_images"]:
            shown["init_images"] = None
        return await _made(studio, order, http, shown)

    @routes.get("/progress")
    async def progress(http: HTTPRequest, skip_current_image: bool = False) -> dict[str, Any]:
        """How far the pictures are that this client waits for."""
        return await asyncio.to_thread(_progress, _orders(studio, http), not skip_current_image)

    @routes.post("/interrupt")
    def interrupt(http: HTTPRequest) -> dict[str, Any]:
        """Cancels the pictures that this client waits for."""
        for order in _orders(studio, http):
            order.cancel()
        return {}

    @routes.post("/skip")
    def skip(http: HTTPRequest) -> None:
        """Cancels those of them that are under way, of the first request."""
        for order in _orders(studio, http)[:1]:
            for drawing in order.drawings:
                if drawing.state is State.running:
                    drawing.cancel()

    @routes.get("/options")
    def get_options() -> dict[str, Any]:
        """The settings of this API."""
        model = studio.models.current
        return {
            "sd_model_checkpoint": model,
            "sd_checkpoint_hash": "",
            "sd_vae": "Automatic",
            "samples_format": "png",
        } | (options)

    @routes.post("/options", openapi_extra=_body({"sd_model_checkpoint": None, "CLIP_stop_at_last_layers": 1}))
    async def set_options(http: HTTPRequest) -> None:
        """Changes the model, CLIP_stop_at_last_layers and randn_source; others pass."""
        given = parsed(await http.body())
        of_settings(given)
        if given.get("sd_model_checkpoint"):
            await studio.models.use(model_name(given["sd_model_checkpoint"]))
        options.update({name: given[name] for name in KEPT if given.get(name) is not None})

    @routes.get("/sd-models")
    def sd_models() -> list[dict[str, Any]]:
        return [_model(name) for name in studio.models.names]

    @routes.get("/samplers")
    def samplers() -> list[dict[str, Any]]:
        return [{"name": theirs, "aliases": [ours], "options": {}} for ours, theirs in SAMPLERS.items()]

    @routes.get("/schedulers")
    def schedulers() -> list[dict[str, Any]]:
        own = {"name": None, "label": None, "aliases": None, "default_rho": -1, "need_inner_model": False}
        return [{**own, "name": name.lower(), "label": name} for name in ("Automatic", *SCHEDULES)]

    @routes.get("/upscalers")
    async def upscalers() -> list[dict[str, Any]]:
        pipe = (await studio.models.get()).pipe
        own = {"model_name": None, "model_path": None, "model_url": None, "scale": 4}
        return [{"name": name, **own} for name in upscaler_names(studio, pipe)]

    @routes.get("/loras")
    def loras() -> list[dict[str, Any]]:
        files = {name: studio.loras.file_of(path) for name, path in studio.loras.paths.items()}
        return [{"name": name, "alias": name, "path": file, "metadata": {}} for name, file in files.items()]

    @routes.get("/embeddings")
    async def embeddings() -> dict[str, Any]:
        learned = (await studio.models.get()).embeddings
        known = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None, "shape": None, "vectors": None}
        by_use = {True: {}, False: {}}
        for name in studio.embeddings.paths:
            by_use[name in learned][name] = known
        return {"loaded": by_use[True], "skipped": by_use[False]}

    @routes.post("/png-info", openapi_extra=_body({"image": ""}))
    async def png_info(http: HTTPRequest) -> dict[str, Any]:
        """The settings in a picture."""
        data = pictures.decoded("image", parsed(await http.body()).get("image"))
        return await asyncio.to_thread(_png_info, data, studio.limits.source_pixels)

    @routes.post("/extra-single-image", openapi_extra=_body({"image": "", "upscaling_resize": 2, "upscaler_1": "None"}))
    async def extra(http: HTTPRequest) -> dict[str, Any]:
        """A picture made larger, without the model."""
        given = parsed(await http.body())
        with studio.reading() as reader:
            return await larger(studio, given, reader, http)

    @routes.get("/memory")
    def memory() -> dict[str, Any]:
        """In bytes."""
        return {"ram": _ram(), "cuda": _devices()}

    for path, constant in EMPTY.items():
        routes.get(path, name=path[1:])(_constant(constant))
    for path in WITHOUT_EFFECT:
        routes.post(path, name=path[1:])(lambda: None)
    return routes


def _constant(value: Any) -> Callable[[], Any]:
    def get() -> Any:
        return value

    return get


def _body(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What OpenAPI says of a body with these fields and defaults."""
    properties = {name: {} if value in (None, "") else {"default": value} for name, value in fields.items()}
    schema = {"type": "object", "properties": properties}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _model(name: str) -> dict[str, Any]:
    return {"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None}


def _known(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a body that are known, with defaults."""
    return {name: given.get(name, default) for name, default in defaults.items()}


async def _made(studio: Studio, order: Order, http: HTTPRequest, body: Mapping[str, Any]) -> dict[str, Any]:
    """Waits; the answer, of the pictures that are done."""
    await finished(order, http)
    done = [drawing for drawing in order.drawings if drawing.state is State.done]
    files = [studio.file(drawing) for drawing in done]
    texts = [metadata.read_parameters(io.BytesIO(file)) for file in files]
    images = [base64.b64encode(file).decode() for file in files] if flag("send_images", body["send_images"]) else []
    info = json.dumps(_info(order, done, texts, body), allow_nan=False)
    return {"images": images, "parameters": dict(body), "info": info}


def _info(order: Order, done: list[Drawing], texts: list[str], body: Mapping[str, Any]) -> dict[str, Any]:
    seeds, known = [drawing.seed for drawing in done], (done[0].settings if done else {})
    prompt, negative = body["prompt"], body["negative_prompt"]
    return {
        "prompt": prompt,
        "all_prompts": [prompt] * len(done),
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * len(done),
        "seed": seeds[0] if seeds else -1,
        "all_seeds": seeds,
        "subseed": -1,
        "all_subseeds": [-1] * len(done),
        "subseed_strength": 0,
        "width": known.get("width"),
        "height": known.get("height"),
        "sampler_name": SAMPLERS.get(known.get("scheduler"), known.get("scheduler")),
        "cfg_scale": known.get("guidance_scale"),
        "steps": known.get("num_inference_steps"),
        "batch_size": body["batch_size"],
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": order.model,
        "sd_model_hash": None,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": known.get("strength", known.get("hires_strength")),
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "job_timestamp": _timestamp(order.created),
        "clip_skip": (known.get("clip_skip") or 0) + 1,
        "is_using_inpainting_conditioning": False,
        "version": f"sdjax {version('sdjax')}",
    }


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y%m%d%H%M%S")


def _orders(studio: Studio, http: HTTPRequest) -> list[Order]:
    """Those of this client that have not ended."""
    owner = http.client and http.client.host
    return [o for o in studio.orders.all if o.api == API and o.owner == owner and not o.ended.is_set()]


def _progress(orders: list[Order], shows: bool) -> dict[str, Any]:
    every = [drawing for order in orders for drawing in order.drawings]
    left = [drawing for drawing in every if drawing.state not in ENDED]
    rows, total = sum(drawing.row for drawing in every), sum(drawing.rows for drawing in every)
    share = rows / total if total else 0.0
    now = next((drawing for drawing in left if drawing.state is State.running), None)
    passed = time.time() - orders[0].created if orders else 0.0
    state = {
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
        "job": orders[0].id if orders else "",
        "job_count": len(left),
        "job_timestamp": _timestamp(orders[0].created) if orders else "0",
        "job_no": len(every) - len(left),
        "sampling_step": now.row if now else 0,
        "sampling_steps": now.rows if now else 0,
    }
    left_seconds = passed / share - passed if share else 0.0
    return {
        "progress": min(share, 0.99) if left else 0.0,
        "eta_relative": left_seconds,
        "state": state,
        "current_image": _preview(now) if shows and now else None,
        "textinfo": None,
    }


def _preview(drawing: Drawing) -> str | None:
    """The last preview as base64, and another one is asked for."""
    drawing.watch()
    shown = drawing.shown
    return base64.b64encode(pictures.file(shown[1], format="PNG")).decode() if shown else None


def _png_info(data: bytes, most_pixels: int) -> dict[str, Any]:
    pictures.opened("image", data, most_pixels)
    try:
        text = metadata.read_parameters(io.BytesIO(data))
    except Exception:  # none, or damaged
        text = ""
    try:
        found = settings.carried("image", data, most_pixels)
    except ValueError:
        found = {}
    return {"info": text, "items": {"parameters": text} if text else {}, "parameters": found}


def _ram() -> dict[str, float]:
    total, free = host.total(), host.available()
    if not math.isfinite(total):
        return {"error": "unknown"}
    return {"free": free, "used": total - free, "total": total}


def _devices() -> dict[str, Any]:
    known = jax.local_devices()[0].memory_stats()
    if not known:
        return {"error": "unavailable"}
    total, used = known.get("bytes_limit", 0), known.get("bytes_in_use", 0)
    return {"system": {"free": total - used, "used": used, "total": total}}
