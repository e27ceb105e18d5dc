"""Chunks through an engine: pictures are encoded and written while the devices compute the next ones."""

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sdjax import inputs
from sdjax.batch.output import Output, Picture
from sdjax.batch.plan import Chunk
from sdjax.batch.progress import Emit, Halved, Made, Noted, Written
from sdjax.engine import Engine, Sampled, Unit, cut
from sdjax.pictures import metadata
from sdjax.pictures.finite import VAE_OVERFLOW
from sdjax.pictures.metadata import picture_settings
from sdjax.runtime.usage import Usage

if TYPE_CHECKING:
    from sdjax.pipeline import StableDiffusionPipeline

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


class Sampler:
    """Samples chunks with a pipeline, over all devices of its mesh, and commits each to an output.

    shared: settings that all pictures have in common, such as the model's name. emit: is called with Made, Written,
    Noted and Halved events, from several threads.
    """

    def __init__(
        self,
        pipe: "StableDiffusionPipeline",
        output: Output,
        shared: Mapping[str, Any],
        emit: Emit = lambda event: None,
    ):
        self.output, self.shared, self.emit = output, shared, emit
        self.engine = Engine(pipe, lambda batch: emit(Halved(batch)))
        self._scheduler = cache(partial(inputs.scheduler_of, pipe))
        self._written: deque[list[Future]] = deque()  # of each call

    @property
    def usage(self) -> Usage:
        return self.engine.usage

    def run(self, chunks: Iterable[Chunk], stop: threading.Event | None = None) -> None:
        """Samples and commits all chunks; after `stop` is set, those that need no further batch.

        Of a chunk with pictures that are not finite the others are written, but it is not finished.
        Chunks are asked for when a device can take them. Raises ValueError where one picture does not fit the memory of
        a device, OSError where one cannot be written.
        """
        writers = ThreadPoolExecutor(os.cpu_count(), "sdjax write")
        try:
            self.engine.run(self._units(chunks), partial(self._deliver, writers), stop)
            self._settle(0)
        finally:
            writers.shutdown(wait=False, cancel_futures=True)
            self._written.clear()

    def _units(self, chunks: Iterable[Chunk]) -> Iterator[Unit]:
        """The tags are (open chunk, place in it)."""
        for chunk in chunks:
            open = _Open(chunk)
            for unit in cut(chunk.group, chunk.items, [(open, place) for place in range(len(chunk))], chunk.batch):
                self._settle(WAITING)
                yield unit

    def _settle(self, waiting: int) -> None:
        """Waits until at most so many calls' pictures wait for a writer."""
        while len(self._written) > waiting:
            for future in self._written.popleft():
                future.result()

    def _deliver(self, writers: ThreadPoolExecutor, pictures: list[Sampled]) -> None:
        if any(picture.mended for picture in pictures):
            self.emit(Noted(VAE_OVERFLOW))
        self._written.append([writers.submit(self._write, *picture.tag, picture) for picture in pictures])

    def _write(self, open: _Open, place: int, sampled: Sampled) -> None:
        """Encodes a picture, and commits its chunk if it was the last one."""
        chunk = open.chunk
        if open.add(place, None if sampled.pixels is None else self._encoded(chunk, place, sampled.pixels, sampled)):
            pictures = [picture for _, picture in sorted(open.pictures.items()) if picture is not None]
            failed = [chunk.indices[place] for place, picture in sorted(open.pictures.items()) if picture is None]
            files = self.output.commit(chunk, pictures)
            nsfw = sum(bool(picture.nsfw) for picture in pictures)
            self.emit(Written(chunk.id, files, len(pictures), nsfw, failed))

    def _encoded(self, chunk: Chunk, place: int, pixels: np.ndarray, sampled: Sampled) -> Picture:
        item = chunk.items[place]
        scheduler = self._scheduler(item.scheduler, item.timestep_spacing)
        settings = picture_settings(item, self.shared, scheduler.config)
        data = metadata.encode(Image.fromarray(pixels), settings, self.output.format)
        picture = Picture(chunk.indices[place], chunk.ids[place], settings, data, sampled.nsfw, sampled.seconds)
        self.emit(Made(picture.index))
        return picture
