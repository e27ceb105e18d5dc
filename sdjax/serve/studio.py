"""What all APIs share: models, orders, the gallery and the limits."""

import asyncio
import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request as HTTPRequest

from sdjax import sampling
from sdjax.fields import whole
from sdjax.pipeline import StableDiffusionPipeline
from sdjax.serve import sizes
from sdjax.serve.catalog import Catalog
from sdjax.serve.fields import Asked, Reader
from sdjax.serve.gallery import Gallery
from sdjax.serve.held import Held, Share
from sdjax.serve.limits import Limits
from sdjax.serve.metrics import Metrics
from sdjax.serve.models import Loaded, Models
from sdjax.serve.orders import Drawing, Order, Orders, State
from sdjax.serve.upscaling import Upscalers

LOOK = 0.5  # seconds between two looks whether a client is still there


@dataclass
class Studio:
    """A server's parts."""

    models: Models
    loras: Catalog
    embeddings: Catalog
    controlnets: Catalog
    upscalers: Upscalers
    gallery: Gallery
    orders: Orders
    metrics: Metrics
    limits: Limits
    places: int
    """pictures of a kind that a device makes at once"""
    queue: int
    """pictures that may wait"""
    is_warm: bool = False
    """whether the usual programs are compiled, or could not be"""
    has_warmed: bool = False
    """whether they are"""
    is_ending: bool = False

    def __post_init__(self):
        self.held = Held(self.limits.held_pixels)
        """by pictures that were sent"""

    @contextlib.contextmanager
    def reading(self) -> Iterator[Reader]:
        """A reader for one request, whose pictures count until it has ended, or was not taken."""
        share = Share(self.held, self.limits.sent_pixels)
        try:
            yield Reader(self.limits, self.loras, self.controlnets, self.upscalers.catalog, share)
        finally:
            if not share.is_kept:
                share.close()

    @property
    def is_idle(self) -> bool:
        """Whether no picture that was asked for is under way."""
        return not any(drawing.state is State.running for order in self.orders.all for drawing in order.drawings)

    def end(self) -> None:
        """Takes no more, and cancels what waits."""
        self.is_ending = True
        self.orders.cancel_waiting()

    def close(self) -> None:
        """Waits until what runs is done and kept."""
        self.models.close(finish=True)
        self.orders.close()

    def file(self, drawing: Drawing) -> bytes:
        """The PNG of a picture that is done. Raises Failed where the gallery has forgotten it."""
        found = self.gallery.file(drawing.name)
        if found is None:
            raise Failed("the picture is no longer kept")
        return found

    async def take(self, asked: Asked, api: str, http: HTTPRequest) -> Order:
        """Lets the pictures be made. Raises ValueError that names what is wrong, QueueFull, Ending."""
        while not self.is_ending:
            loaded = await self.models.get(asked.model)
            pipe = await asyncio.to_thread(self._view, loaded, asked)
            if asked.eta is not None:
                sampler = sampling.from_config(pipe.scheduler.config, sampler="ddim", eta=asked.eta)
                asked = asked._replace(request=replace(asked.request, scheduler=sampler))
            await asyncio.to_thread(sizes.check, loaded, asked.request, self.limits)
            if self.is_ending:
                break
            try:
                order = await self.orders.take(asked, loaded, pipe, api, http.client and http.client.host)
            except RuntimeError:
                if not self.is_ending and self.models.has(loaded):
                    raise
                continue
            if self.is_ending:  # since it was asked
                self.orders.cancel_waiting()
            return order
        raise Ending("the server ends")

    def _view(self, loaded: Loaded, asked: Asked) -> StableDiffusionPipeline:
        """The pipeline with the networks that are asked for."""
        return loaded.networks.view(asked.request, asked.networks, self.controlnets, self.upscalers.catalog)


class Ending(RuntimeError):
    """No more is taken."""


class Failed(RuntimeError):
    """A picture could not be made."""


async def finished(order: Order, http: HTTPRequest) -> None:
    """Waits for an order; where the client goes, it is cancelled. Raises ValueError, Failed where it failed."""
    while not order.ended.is_set():
        try:
            await asyncio.wait_for(order.ended.wait(), LOOK)
        except TimeoutError:
            if await http.is_disconnected():
                order.cancel()
    for drawing in order.drawings:
        if drawing.error:
            raise (ValueError if drawing.is_refused else Failed)(drawing.error)


def parsed(data: bytes) -> Mapping[str, Any]:
    """The object of JSON. Raises ValueError for what is none."""
    try:
        found = json.loads(data, parse_int=whole, parse_constant=_constant)
    except (ValueError, RecursionError):
        raise ValueError("body: is no JSON") from None
    if not isinstance(found, dict):
        raise ValueError("body: must be an object of JSON")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
