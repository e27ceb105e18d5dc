"""Chunks through the devices of a pipeline: a batch is on its way while the last is fetched, encoded and written."""

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from sdjax import inputs
from sdjax.batch.output import Output, Picture
from sdjax.batch.plan import Chunk, Group, Unit
from sdjax.batch.progress import Halved, Made, Noted, Tell, Written
from sdjax.batch.usage import Dispatch, Usage
from sdjax.pictures import metadata
from sdjax.pictures.finite import VAE_OVERFLOW
from sdjax.pictures.metadata import picture_settings
from sdjax.runtime.lowering import is_out_of_memory

if TYPE_CHECKING:
    from sdjax.pipeline import StableDiffusionPipeline, StableDiffusionPipelineOutput

AHEAD = 1  # calls that wait on the devices while one is computed
WAITING = 2  # calls whose pictures wait for a writer, beyond which the devices wait


class _Open:
    """A chunk under way."""

    def __init__(self, chunk: Chunk):
        self.chunk = chunk
        self.pictures: dict[int, Picture | None] = {}
        self.lock = threading.Lock()

    def add(self, place: int, picture: Picture | None) -> bool:
        """None: it is not finite. Returns whether this was the last one."""
        with self.lock:
            self.pictures[place] = picture
            return len(self.pictures) == len(self.chunk)


class _Slot(NamedTuple):
    """What one device computes in a call: a unit that starts at a place of a chunk."""

    open: _Open
    start: int
    unit: Unit


class Sampler:
    """Samples chunks with a pipeline, over all devices of its mesh, and commits each to an output.

    shared: settings that all pictures have in common, such as the model's name. tell: is given Made, Written, Noted and
    Halved events, from several threads.
    """

    def __init__(
        self,
        pipe: "StableDiffusionPipeline",
        output: Output,
        shared: Mapping[str, Any],
        tell: Tell = lambda event: None,
    ):
        self.pipe, self.output, self.shared, self.tell = pipe, output, shared, tell
        self.usage = Usage()
        self._set = {} if pipe.loras is None else {k: v for k, v in pipe.loras.weights.items() if v}
        self._scheduler = cache(partial(inputs.scheduler_of, pipe))
        self._most: int | None = None  # pictures of a device at once, after it ran out of memory
        self._open: dict[str, _Open] = {}
        self._compiled: set[tuple] = set()

    def run(self, chunks: Iterable[Chunk], stop: threading.Event | None = None) -> None:
        """Samples and commits all chunks; after `stop` is set, those that need no further batch.

        Of a chunk with pictures that are not finite the others are written, but it is not finished.
        Chunks are asked for when a device can take them. Where a device runs out of memory, the batch is halved for all
        that is not written. Raises ValueError where one picture does not fit, OSError where one cannot be written.
        """
        stop, left, shown = stop or threading.Event(), iter(chunks), self.pipe.shows_progress
        self.pipe.set_progress_bar_config(disable=True)
        fetcher, writers = ThreadPoolExecutor(1, "sdjax fetch"), ThreadPoolExecutor(os.cpu_count(), "sdjax write")
        try:
            while not self._sampled(left, stop, fetcher, writers):
                left = itertools.chain([open.chunk for open in self._open.values()], left)
                self._open.clear()
        finally:
            fetcher.shutdown(wait=False, cancel_futures=True)
            writers.shutdown(wait=False, cancel_futures=True)
            self.pipe.set_progress_bar_config(disable=not shown)
            if self.pipe.loras is not None:
                self.pipe.set_loras(self._set)

    def _sampled(
        self, chunks: Iterable[Chunk], stop: threading.Event, fetcher: ThreadPoolExecutor, writers: ThreadPoolExecutor
    ) -> bool:
        """Whether all went well; otherwise a device ran out of memory, and the batch is smaller from now on."""
        computed: deque[Future[list[Future]]] = deque()
        written: deque[list[Future]] = deque()

        def settle(calls: int, waiting: int) -> None:
            while len(computed) > calls:
                written.append(computed.popleft().result())
            while len(written) > waiting:
                for future in written.popleft():
                    future.result()

        try:
            for slots in self._calls(chunks, stop):
                begun, before = time.perf_counter(), time.thread_time()
                made = self._sample(slots)
                call = Dispatch(begun, time.perf_counter(), time.thread_time() - before, self._is_new(slots))
                computed.append(fetcher.submit(self._fetch, writers, slots, made, call))
                settle(AHEAD, WAITING)
            settle(0, 0)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            done, _ = wait(computed)
            made = [future.result() for future in done if future.exception() is None]
            wait(itertools.chain.from_iterable([*written, *made]))
            self._halve(slots)
            return False
        return True

    def _halve(self, slots: list[_Slot]) -> None:
        chunk = slots[0].open.chunk
        if chunk.batch == 1:
            size = f"{chunk.group.width}x{chunk.group.height}"
            raise ValueError(f"a picture of {size} does not fit into the memory of a device, even by itself")
        self._most = chunk.batch // 2
        self.tell(Halved(self._most))

    def _calls(self, chunks: Iterable[Chunk], stop: threading.Event) -> Iterator[list[_Slot]]:
        """A slot for each device, or fewer at the end of a group."""
        slots: list[_Slot] = []
        for chunk in chunks:
            if self._most is not None:
                chunk = replace(chunk, batch=min(chunk.batch, self._most))
            open = self._open[chunk.id] = _Open(chunk)  # before anything can go wrong
            if slots and (slots[0].open.chunk.group, slots[0].open.chunk.batch) != (chunk.group, chunk.batch):
                yield slots
                slots = []
            for number, unit in enumerate(chunk.units):
                if stop.is_set():
                    return
                slots.append(_Slot(open, number * chunk.batch, unit))
                if len(slots) == self.pipe.mesh.size:
                    yield slots
                    slots = []
        if slots and not stop.is_set():
            yield slots

    def _sample(self, slots: list[_Slot]) -> "StableDiffusionPipelineOutput":
        """Being computed; pictures are uint8 [devices * batch H W 3]."""
        group = slots[0].open.chunk.group
        padded = slots + slots[-1:] * (self.pipe.mesh.size - len(slots))
        items = [item for slot in padded for item in slot.unit.items]
        self._set_loras(group)
        return _in_uint8(self.pipe.sample(items, output_type="jax"))

    def _set_loras(self, group: Group) -> None:
        if not group.loras and self.pipe.loras is None:
            return
        weights = {**self._set, **dict(group.loras)}
        known = {} if self.pipe.loras is None else self.pipe.loras.weights
        for path in weights.keys() - known.keys():
            self.pipe.load_lora(path, 0.0, name=path)
        if weights != {name: weight for name, weight in self.pipe.loras.weights.items() if weight}:
            self.pipe.set_loras(weights)

    def _is_new(self, slots: list[_Slot]) -> bool:
        key = (slots[0].open.chunk.batch, *slots[0].open.chunk.group.shape)
        is_new = key not in self._compiled
        self._compiled.add(key)
        return is_new

    def _fetch(
        self,
        writers: ThreadPoolExecutor,
        slots: list[_Slot],
        made: "StableDiffusionPipelineOutput",
        call: Dispatch,
    ) -> list[Future]:
        """Waits for the devices, then hands each picture to a writer."""
        made.images.block_until_ready()
        seconds = self.usage.add(call) / sum(len(slot.unit) for slot in slots)
        not_finite = np.asarray(made.not_finite)
        if not_finite.any():
            made, overflowed = _in_uint8(made.mended()), not_finite
            not_finite = np.asarray(made.not_finite)
            if (overflowed & ~not_finite).any():
                self.tell(Noted(VAE_OVERFLOW))
        pixels, flags = np.asarray(made.images), made.nsfw_content_detected
        flags = None if flags is None else np.asarray(flags)
        tasks = []
        for first, slot in zip(itertools.count(0, slots[0].open.chunk.batch), slots, strict=False):
            for offset in range(len(slot.unit)):
                place = first + offset
                nsfw = None if flags is None else bool(flags[place])
                own = None if not_finite[place] else pixels[place]
                task = (slot.open, slot.start + offset, own, nsfw, seconds)
                tasks.append(writers.submit(self._write, *task))
        return tasks

    def _write(self, open: _Open, place: int, pixels: np.ndarray | None, nsfw: bool | None, seconds: float) -> None:
        """Encodes a picture (None: it is not finite), and commits its chunk if it was the last one."""
        chunk = open.chunk
        picture = None if pixels is None else self._encoded(chunk, place, pixels, nsfw, seconds)
        if open.add(place, picture):
            pictures = [picture for _, picture in sorted(open.pictures.items()) if picture is not None]
            failed = [chunk.indices[place] for place, picture in sorted(open.pictures.items()) if picture is None]
            files = self.output.commit(chunk, pictures)
            self._open.pop(chunk.id, None)
            nsfw = sum(bool(picture.nsfw) for picture in pictures)
            self.tell(Written(chunk.id, files, len(pictures), nsfw, failed))

    def _encoded(self, chunk: Chunk, place: int, pixels: np.ndarray, nsfw: bool | None, seconds: float) -> Picture:
        item = chunk.items[place]
        scheduler = self._scheduler(item.scheduler, item.timestep_spacing)
        settings = picture_settings(item, self.shared, scheduler.config)
        data = metadata.encode(Image.fromarray(pixels), settings, self.output.format)
        picture = Picture(chunk.indices[place], chunk.ids[place], settings, data, nsfw, seconds)
        self.tell(Made(picture.index))
        return picture


def run_chunk(
    pipe: "StableDiffusionPipeline", chunk: Chunk, output: Output, shared: Mapping[str, Any] | None = None
) -> None:
    """Samples a chunk and commits it, unless it is there already: however often it is called, the same bytes."""
    if not output.finished(chunk, verify=True):
        Sampler(pipe, output, shared or {}).run([chunk])


def _in_uint8(made: "StableDiffusionPipelineOutput") -> "StableDiffusionPipelineOutput":
    return replace(made, images=_to_uint8(made.images))


@jax.jit
def _to_uint8(pictures: jax.Array) -> jax.Array:
    """uint8 from float32 in 0..1, rounded to the nearest."""
    return jnp.round(pictures * 255).astype(jnp.uint8)
