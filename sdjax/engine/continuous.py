"""Continuous batching: a request is given a place as one falls free, beside pictures that are half done.

A sampler is a table with an image axis, so that prompts, seeds, samplers, step counts, guidance, strength and masks mix
in one program; what is done is decoded while the others go on. A seed's picture does not depend on what is beside it.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Self

from jax import Array
from PIL import Image

from sdjax import inputs
from sdjax.engine.groups import Group, prompt_chunk_counter, row_counter
from sdjax.engine.job import Job
from sdjax.engine.lora_sets import LoraSets
from sdjax.engine.sampled import fetched, in_uint8
from sdjax.engine.slots import Slots
from sdjax.engine.waiting import Waiting
from sdjax.request import Request
from sdjax.runtime import bounds
from sdjax.runtime.bounds import Load
from sdjax.runtime.lowering import DoesNotFit, is_out_of_memory
from sdjax.runtime.programs import SEGMENT_ROWS

if TYPE_CHECKING:
    from sdjax.pipeline import StableDiffusionPipeline, StableDiffusionPipelineOutput

OPEN_ROWS = 2  # that run at once where a place is free: a request that comes waits no longer
KEPT_ROWS = 8  # that the first finished picture of several waits for others to be decoded with it at most
ROOMS = 4  # groups that are under way at once: the arrays of each are on the devices
TURN_ROWS = 16  # of a group before another one's turn: between groups LoRAs may have to be merged
AHEAD = 1  # runs of rows that wait on the devices while one is computed


class _Room:
    """Pictures of one group and form under way."""

    def __init__(self, slots: Slots, used: float):
        self.slots, self.used = slots, used
        self.kept = 0
        """rows since the first of the finished pictures that wait to be decoded"""

    @property
    def priority(self) -> int:
        return max(job.priority for job in self.slots.jobs)

    @property
    def load(self) -> int:
        """What a row costs: pixels of a device."""
        return self.slots.width * self.slots.group.width * self.slots.group.height

    def rows(self, *, is_open: bool) -> int:
        """How many to run at once: until the first picture is done; fewer where a request that comes finds a place."""
        left = [job.rows - job.row for job in self.slots.jobs if not job.is_done]
        return min([OPEN_ROWS if is_open else SEGMENT_ROWS, *left]) if left else 0

    def finished(self) -> list[Job]:
        """The pictures to decode now, one of a device at most: where each device has one, or they have waited for
        KEPT_ROWS, or there is nothing else to do."""
        jobs = self.slots.jobs
        done = [job for job in jobs if job.is_done]
        first = self.slots.one_of_each_device(done)
        is_time = len(first) == self.slots.pipe.mesh.size or self.kept >= KEPT_ROWS or len(done) == len(jobs)
        return first if is_time else []


class ContinuousEngine:
    """Samples requests with a pipeline as they come, over all devices of its mesh.

    places: pictures of each group that a device has under way at most. waiting: requests that may wait. A thread of its
    own uses the pipeline, which nothing else may use meanwhile. Groups take turns, by what they cost the devices.
    """

    def __init__(self, pipe: "StableDiffusionPipeline", *, places: int = 4, waiting: int = 1024):
        self.pipe, self._shown = pipe, pipe.shows_progress
        pipe.set_progress_bar_config(disable=True)
        self._loras, self._waiting = LoraSets(pipe), Waiting(waiting)
        self.rows = row_counter(pipe)
        """of a request: evaluations of the model"""
        self.chunks = prompt_chunk_counter([*pipe.tokenizers.values()], self.rows)
        """of a request: those of its longest text"""
        self._places, self._limits, self._alone = places, dict[Group, int](), set[Group]()
        self._jobs: dict[int, Job] = {}
        self._rooms: list[_Room] = []
        self._current: _Room | None = None
        self._running: deque[tuple[_Room, Array]] = deque()
        self._changed, self._closing = threading.Condition(), False
        self._fetcher = ThreadPoolExecutor(1, "sdjax fetch")
        self._thread = threading.Thread(target=self._work, name="sdjax engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(finish=kind is None)

    def submit(
        self,
        request: Request,
        *,
        owner: Hashable = None,
        priority: int = 0,
        pipe: "StableDiffusionPipeline | None" = None,
    ) -> Job:
        """Lets a request wait for a place. Raises ValueError for what is wrong with it, QueueFull.

        pipe: a view of the engine's pipeline, see `DiffusionPipeline.with_networks`.
        """
        pipe = pipe or self.pipe
        for check, _ in inputs.CHECKS:
            check(pipe, request)
        height, width = inputs.request_size(pipe, request)
        bounds.check(pipe.models, pipe.mesh, Load(1, height, width, tiled=request.vae_tiling))
        networks = tuple(id(getattr(pipe, name)) for name in (*pipe.controls, "upscaler"))
        known = {"width": width, "height": height, "table": None, "networks": networks}
        group = Group.of(request, self.chunks(request))._replace(**known)
        job = Job(request, pipe, group, self.rows(request), owner, priority)
        with self._changed:
            if self._closing:
                raise RuntimeError("the engine is closed")
            self._waiting.push(job)
            self._jobs[id(job)] = job
            self._changed.notify()
        key = id(job)  # the job itself would be kept by its own future
        job.future.add_done_callback(lambda _: self._jobs.pop(key))
        return job

    @property
    def jobs(self) -> list[Job]:
        """Those that wait or are under way, in the order in which they came."""
        return list(self._jobs.values())

    def ahead(self, jobs: Sequence[Job]) -> int:
        """How many that wait have their turn before the first of these."""
        with self._changed:
            return self._waiting.ahead(jobs)

    def close(self, *, finish: bool = True) -> None:
        """Ends the thread: after all requests are done, or, unless finish, after the rows under way."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        for job in [] if finish else self.jobs:
            job.future.cancel()
        self._thread.join()
        self._fetcher.shutdown()
        self._loras.restore()
        self.pipe.set_progress_bar_config(disable=not self._shown)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._rooms or len(self._waiting))
                if not self._rooms and not len(self._waiting):
                    return
            try:
                self._turn()
            except Exception as error:
                self._rooms = []
                for job in self.jobs:
                    _fail(job, error)

    def _turn(self) -> None:
        """Frees places, fills them, and runs some rows of one room."""
        for room in self._rooms:
            gone = [job for job in room.slots.jobs if job.future.cancelled()]
            room.slots.drop(gone)
            for job in gone:
                job.end()
        self._close_rooms()
        self._admit()
        if not self._rooms:
            self._running.clear()
            return
        room = self._current = min(self._rooms, key=self._order)
        try:
            self._run(room)
            self._show(room)
            self._finish(room)
        except Exception as error:  # whatever it is, of these requests alone
            self._lose(room, error)
        self._catch_up()
        self._close_rooms()

    def _order(self, room: _Room) -> tuple[float, float]:
        """By priority, then by what each has cost; the one whose turn it is goes on for TURN_ROWS."""
        return -room.priority, room.used - (TURN_ROWS * room.load if room is self._current else 0)

    def _close_rooms(self) -> None:
        self._rooms = [room for room in self._rooms if room.slots.jobs]

    def _admit(self) -> None:
        """Gives free places to those that wait."""
        with self._changed:
            groups = self._waiting.groups()
        for group in groups:
            if self._must_wait(group):
                return  # nor do those that came later, so that rooms are emptied
            if not can_mix(group):
                self._begin(group, self._next(group))
                return  # the rooms have their turn
            while jobs := self._next(group):
                self._begin(group, jobs)

    def _must_wait(self, group: Group) -> bool:
        """Whether there is no room for a group."""
        others = [room for room in self._rooms if room.slots.group != group]
        return len(others) >= (1 if group in self._alone else ROOMS)

    def _next(self, group: Group) -> list[Job]:
        """As many of those that wait as devices have a free place; or one that is to be run by itself."""
        free = [len(room.slots.open_devices(self._most(group))) for room in self._rooms if room.slots.group == group]
        with self._changed:
            return self._waiting.take(group, min(free, default=self.pipe.mesh.size) if can_mix(group) else 1)

    def _begin(self, group: Group, jobs: Sequence[Job]) -> None:
        """Begins with some requests of a group; where one of several is wrong, with each by itself."""
        for job in jobs:
            job.begun = time.perf_counter()
        if not can_mix(group):
            for job in jobs:
                self._run_whole(job)
            return
        try:
            self._loras.use(group.loras)
            self._place(group, jobs)
        except Exception as error:
            if len(jobs) == 1:
                _fail(jobs[0], error)
                return
            for job in jobs:
                self._begin(group, [job])

    def _place(self, group: Group, jobs: Sequence[Job]) -> None:
        for room in self._rooms:
            if room.slots.group == group:
                devices = room.slots.open_devices(self._most(group))[: len(jobs)]
                if room.slots.admit(jobs, devices):
                    return
        room = _Room(Slots(jobs[0].pipe, group), min((room.used for room in self._rooms), default=0))
        room.slots.admit(jobs, range(len(jobs)))
        self._rooms.append(room)

    def _run(self, room: _Room) -> None:
        self._loras.use(room.slots.group.loras)
        with self._changed:
            is_open = (
                not len(self._waiting) and len(room.slots.jobs) < self._most(room.slots.group) * self.pipe.mesh.size
            )
        if not (rows := room.rows(is_open=is_open)):
            return
        ready = room.slots.run(rows)
        room.used += rows * room.load
        room.kept += rows * any(job.is_done for job in room.slots.jobs)
        self._running.append((room, ready))

    def _catch_up(self) -> None:
        """Waits until the devices have no more to do than AHEAD."""
        while len(self._running) > AHEAD:
            room, ready = self._running.popleft()
            try:
                ready.block_until_ready()
            except Exception as error:
                self._lose(room, error)

    def _most(self, group: Group) -> int:
        """Pictures of a group that a device takes at once."""
        return self._limits.get(group, self._places)

    def _show(self, room: _Room) -> None:
        """Gives the previews that are asked for."""
        asked = [job for job in room.slots.jobs if job.previews]
        while jobs := room.slots.one_of_each_device(asked):
            for job, picture in zip(jobs, room.slots.previews(jobs), strict=True):
                job.show(picture)
                asked.remove(job)

    def _finish(self, room: _Room) -> None:
        """Has what is done decoded, and fetched by another thread."""
        if not room.finished():
            return
        while done := room.finished():
            self._fetcher.submit(_deliver, *room.slots.take(done))
        room.kept *= any(job.is_done for job in room.slots.jobs)
        with self._changed:
            if room.slots.group not in self._waiting.groups():
                room.slots.narrow()

    def _lose(self, room: _Room, error: Exception) -> None:
        """Begins again with fewer at once after a device ran out of memory; else its requests have failed."""
        if room not in self._rooms:
            return
        self._rooms.remove(room)
        jobs, group, width = room.slots.jobs, room.slots.group, room.slots.width
        if is_out_of_memory(error) and (width > 1 or self._rooms):
            self._limits[group] = max(1, width // 2)
            if width == 1:
                self._alone.add(group)
            with self._changed:
                for job in jobs:
                    job.row, job.columns = 0, {}
                    self._waiting.put_back(job)
            return
        if is_out_of_memory(error):
            size = f"{group.width}x{group.height}"
            error = DoesNotFit(f"a picture of {size} does not fit into the memory of a device, even by itself")
        for job in jobs:
            _fail(job, error)

    def _run_whole(self, job: Job) -> None:
        """In one call, with nothing beside it."""

        def watch(step: int, total: int, preview: Callable[[], list[Image.Image]]) -> None:
            job.row, job.rows = max(job.row, step), max(job.rows, total)
            if job.future.cancelled():
                raise _Cancelled
            if job.previews:
                job.show(preview()[0])

        try:
            self._loras.use(job.group.loras)
            made = job.pipe.sample([job.request], output_type="jax", callback=watch)
            self._fetcher.submit(_deliver, in_uint8(made), [(0, job)])
        except _Cancelled:
            job.end()
        except Exception as error:
            _fail(job, error)


class _Cancelled(Exception):
    pass


def can_mix(group: Group) -> bool:
    """Whether its pictures can be at different rows: without a second pass, and without features that are kept."""
    return group.hires is None and group.cache_interval is None


def _fail(job: Job, error: Exception) -> None:
    if job.future.set_running_or_notify_cancel():
        job.future.set_exception(error)
    job.end()


def _deliver(made: "StableDiffusionPipelineOutput", found: Sequence[tuple[int, Job]]) -> None:
    """Waits for the devices."""
    try:
        pictures = fetched(made, found, 0.0)
    except Exception as error:
        for _, job in found:
            _fail(job, error)
        return
    done = time.perf_counter()
    for picture in pictures:
        job = picture.tag
        if job.future.set_running_or_notify_cancel():
            job.future.set_result(picture._replace(tag=job.request, seconds=done - job.begun))
        job.end()
