"""What was asked for: pictures of one request, with seeds that count up, on their way and done."""

import asyncio
import contextlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from enum import StrEnum
from typing import Any

from PIL import Image

from sdjax.engine.job import Job
from sdjax.engine.sampled import Sampled
from sdjax.pictures import finite
from sdjax.pipeline import StableDiffusionPipeline
from sdjax.request import Request
from sdjax.serve import pictures, settings
from sdjax.serve.catalog import Catalog
from sdjax.serve.fields import Asked
from sdjax.serve.forms import Forms
from sdjax.serve.gallery import Gallery
from sdjax.serve.metrics import Metrics
from sdjax.serve.models import Loaded

REMEMBERED = 256  # orders that are done
PREVIEW_SECONDS = 0.5  # between previews of a picture
ENCODERS = 2
BLACK = "the safety checker made it black"


class State(StrEnum):
    queued = "queued"
    running = "running"
    done = "done"
    cancelled = "cancelled"
    failed = "failed"


ENDED = (State.done, State.cancelled, State.failed)


class Drawing:
    """One picture of an order."""

    def __init__(self, index: int, seed: int, job: Job, on_shown: Callable[[], None]):
        self.index, self.seed, self.rows, self._on_shown = index, seed, job.rows, on_shown
        self._job: Job | None = job
        self._ended: State | None = None
        self.name: str | None = None
        """in the gallery"""
        self.settings: dict[str, Any] | None = None
        self.error: str | None = None
        self.is_refused = False
        """whether the request is what is wrong"""
        self.is_flagged = False
        self._preview: Future | None = None
        self._asked = 0.0
        self.shown: tuple[int, Image.Image] | None = None
        """the number of the last preview and the picture"""

    @property
    def job(self) -> Job | None:
        """None: it has ended."""
        return self._job

    @property
    def state(self) -> State:
        job = self._job
        if job is None:
            return self._ended
        return State.running if job.begun else State.queued

    @property
    def row(self) -> int:
        job = self._job
        return job.row if job else self.rows if self._ended is State.done else 0

    def cancel(self) -> None:
        """Lets the engine forget it, unless it is done."""
        if job := self._job:
            job.future.cancel()

    def end(self, state: State, **found: Any) -> None:
        """What has become of it: settings and name, or error, which whoever looks at it meanwhile looks for, last."""
        for name, value in found.items():
            setattr(self, name, value)
        self._ended, self._job, self._preview, self.shown = state, None, None, None

    def watch(self) -> None:
        """Asks for a preview, unless there is a new one."""
        job, now = self._job, time.monotonic()
        if job is None or self._preview is not None or now - self._asked < PREVIEW_SECONDS:
            return
        self._asked = now
        self._preview = preview = job.preview()
        preview.add_done_callback(self._show)

    def _show(self, preview: Future) -> None:
        before = self.shown  # `end` may take it away meanwhile
        if self._job is not None and not preview.cancelled() and not preview.exception():
            self.shown = (before[0] + 1 if before else 0), preview.result()
            self._on_shown()
        self._preview = None

    def json(self) -> dict[str, Any]:
        """Its state, and what it has become."""
        found = {"seed": self.seed, "state": self.state, "row": self.row, "rows": self.rows}
        if self.name is not None:
            found |= {"url": url(self.name), "settings": self.settings}
        if self.is_flagged:
            found["warning"] = BLACK
        return found | ({"error": self.error} if self.error else {})


def url(name: str) -> str:
    """Where a picture of the gallery is."""
    return f"/pictures/{name}"


class Order:
    """Pictures of one request."""

    def __init__(self, loaded: Loaded, asked: Asked, api: str, owner: Hashable):
        self.id, self._loaded, self._share = secrets.token_hex(8), loaded, asked.share
        self.beside = asked.networks.settings | ({} if asked.eta is None else {"eta": asked.eta})
        """settings beside the fields of the request"""
        self.model, self.api, self.owner = loaded.name, api, owner
        self.created = time.time()
        self.drawings: list[Drawing] = []
        self.ended = asyncio.Event()
        """set when all pictures are done, cancelled or failed"""
        self._loop, self._watchers = asyncio.get_running_loop(), set[asyncio.Event]()

    @property
    def state(self) -> State:
        """Running until all have ended; failed where one has, else cancelled where one is."""
        states = {drawing.state for drawing in self.drawings}
        if not states <= {*ENDED}:
            return State.queued if states <= {State.queued, State.cancelled} else State.running
        return next(state for state in (State.failed, State.cancelled, State.done) if state in states)

    @property
    def loaded(self) -> Loaded | None:
        """None: all has ended, and the model may be freed."""
        return self._loaded

    def forget(self) -> None:
        """Lets the model be freed, and others send pictures."""
        self._loaded = None
        self._share.close()

    def wake(self) -> None:
        """Tells whoever watches it that something has changed; of any thread."""
        with contextlib.suppress(RuntimeError):  # the server has ended
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        if self.state in ENDED:
            self.ended.set()
        for watcher in self._watchers:
            watcher.set()

    @contextlib.contextmanager
    def watched(self) -> Iterator[Callable[[float], Awaitable[None]]]:
        """A function that waits until something has changed, or for so many seconds."""
        watcher = asyncio.Event()
        self._watchers.add(watcher)

        async def wait(seconds: float) -> None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(watcher.wait(), seconds)
            watcher.clear()

        try:
            yield wait
        finally:
            self._watchers.discard(watcher)

    def cancel(self) -> None:
        """All that is not done."""
        for drawing in self.drawings:
            drawing.cancel()

    def json(self) -> dict[str, Any]:
        """Its state and those of its pictures."""
        return {
            "id": self.id,
            "state": self.state,
            "position": position(self) if self.state is State.queued else 0,
            "created": self.created,
            "pictures": [drawing.json() for drawing in self.drawings],
        }


def position(order: Order) -> int:
    """How many pictures wait before its first one."""
    loaded, jobs = order.loaded, [job for drawing in order.drawings if (job := drawing.job)]
    return loaded.engine.ahead(jobs) if loaded else 0


class Orders:
    """Takes orders, keeps their pictures, and forgets old ones."""

    def __init__(self, gallery: Gallery, loras: Catalog, metrics: Metrics, forms: Forms):
        self._gallery, self._loras, self._metrics, self._forms = gallery, loras, metrics, forms
        self._orders: OrderedDict[str, Order] = OrderedDict()
        self._encoders = ThreadPoolExecutor(ENCODERS, "sdjax pictures")

    @property
    def all(self) -> list[Order]:
        """The newest one last."""
        return list(self._orders.values())

    def get(self, id: str) -> Order | None:
        return self._orders.get(id)

    async def take(
        self, asked: Asked, loaded: Loaded, pipe: StableDiffusionPipeline, api: str, owner: Hashable
    ) -> Order:
        """Lets the engine have its pictures. Raises ValueError for what is wrong with it, QueueFull.

        pipe: the model's, or a view of it.
        """
        order = Order(loaded, asked, api, owner)
        jobs = await asyncio.to_thread(_submit, asked, loaded, pipe, owner)
        await asyncio.to_thread(self._forms.use, (loaded.name, jobs[0].group.shape))
        numbered = enumerate(zip(asked.seeds, jobs, strict=True))
        order.drawings = [Drawing(i, seed, job, order.wake) for i, (seed, job) in numbered]
        self._orders[order.id] = order
        asked.share.is_kept = True
        for drawing, job in zip(order.drawings, jobs, strict=True):
            job.future.add_done_callback(self._keeper(order, drawing, job.request))
        self._forget()
        return order

    def _keeper(self, order: Order, drawing: Drawing, request: Request) -> Callable[[Future], None]:
        def keep(future: Future) -> None:
            try:
                self._encoders.submit(self._keep, order, drawing, request, future)
            except RuntimeError:  # the server ends
                drawing.end(State.cancelled)
                order.wake()

        return keep

    def _keep(self, order: Order, drawing: Drawing, request: Request, future: Future) -> None:
        """Keeps the picture of a job that has ended, and tells whoever waits for the order."""
        try:
            drawing.end(State.done, **self._kept(order, request, future.result()))
        except CancelledError:
            drawing.end(State.cancelled)
        except Exception as error:
            drawing.end(State.failed, is_refused=isinstance(error, ValueError), error=self._said(error, request))
        self._metrics.picture(drawing.state, time.time() - order.created)
        if order.state in ENDED:
            order.forget()
        order.wake()

    def _said(self, error: Exception, request: Request) -> str:
        """What is wrong, in one line without the folders of this machine."""
        if isinstance(error, OSError):
            return error.strerror or type(error).__name__
        said = " ".join(str(error).split())
        for path, _ in request.loras:
            said = said.replace(path, self._loras.file_of(path))
        return said or type(error).__name__

    def _kept(self, order: Order, request: Request, sampled: Sampled) -> dict[str, Any]:
        if sampled.pixels is None:
            raise ValueError(finite.message([True], [request.seed]))
        carried = settings.of_request(order.loaded, request, self._loras) | order.beside
        name = self._gallery.add(Image.fromarray(sampled.pixels), carried, time.time())
        return {"settings": settings.fields(carried), "is_flagged": bool(sampled.nsfw), "name": name}

    def _forget(self) -> None:
        """The oldest of those that have ended."""
        ended = [order.id for order in self._orders.values() if order.ended.is_set()]
        for id in ended[: max(0, len(ended) - REMEMBERED)]:
            del self._orders[id]

    def cancel_waiting(self) -> None:
        """Cancels the pictures that are not begun."""
        for order in self.all:
            for drawing in order.drawings:
                if drawing.state is State.queued:
                    drawing.cancel()

    def close(self) -> None:
        """Waits for the pictures that are being kept."""
        self._encoders.shutdown()


def _submit(asked: Asked, loaded: Loaded, pipe: StableDiffusionPipeline, owner: Hashable) -> list[Job]:
    """All of its pictures, or none."""
    jobs: list[Job] = []
    try:
        for seed in asked.seeds:
            jobs.append(loaded.engine.submit(replace(asked.request, seed=seed), owner=owner, pipe=pipe))
    except BaseException:
        for job in jobs:
            job.future.cancel()
        raise
    return jobs


def preview_urls(drawings: Sequence[Drawing], seen: dict[int, int]) -> list[dict[str, Any]]:
    """The previews that are newer than those seen, by index, as data."""
    found = []
    for drawing in drawings:
        drawing.watch()
        shown = drawing.shown
        if shown and seen.get(drawing.index) != shown[0]:
            seen[drawing.index] = shown[0]
            found.append({"index": drawing.index, "image": pictures.data_url(shown[1])})
    return found
