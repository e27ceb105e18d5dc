"""What one node of a cluster does: it loads a job's model once, and runs chunks with it."""

import itertools
import os
import queue
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, NamedTuple

from sdjax.batch import prepare, record
from sdjax.batch.job import Items
from sdjax.batch.plan import Chunk, Plan
from sdjax.batch.prepare import Prepared
from sdjax.batch.progress import Event, Kept, Written
from sdjax.batch.record import Record
from sdjax.batch.sampling import Sampler
from sdjax.runtime.usage import Usage

PATIENCE_SECONDS = 0.2  # for the next chunk, before a call that it would fill is made without it


class Checked(NamedTuple):
    """A job as a node has checked it against the model that it loaded."""

    items: Items
    fingerprint: str
    made_with: Mapping[str, str]
    devices: int
    words: Mapping[str, str]
    """of the textual inversions, by path"""


class Worker:
    """A pipeline on all devices of a node, loaded when it is first needed. Its methods may be called from threads.

    folder: what relative paths start from. The other arguments are those of `prepare.prepare`.
    """

    def __init__(self, folder: str, items: Items, out: str, options: Mapping[str, Any]):
        self._arguments, self._lock = (folder, items, out, options), threading.Lock()
        self._ready: Prepared | None = None

    @property
    def ready(self) -> Prepared:
        """The checked job and its pipeline; also in an actor that was started again, which no one asks to check."""
        with self._lock:
            if self._ready is None:
                folder, items, out, options = self._arguments
                os.chdir(folder)
                ready = prepare.prepare(items, out, **options)
                self.sampler = Sampler(ready.pipe, ready.output, ready.shared, self._emit)
                self.asked: queue.SimpleQueue[Chunk] = queue.SimpleQueue()
                self.answers: dict[str, Future[list[Event]]] = {}
                self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
                threading.Thread(target=self._sample, name="sdjax worker", daemon=True).start()
                self._ready = ready
            return self._ready

    def check(self) -> Checked:
        """Loads the model and checks the job against it."""
        ready, words = self.ready, self.ready.shared.get("embeddings", {})
        return Checked(ready.items, ready.output.fingerprint, record.versions(), ready.pipe.mesh.size, words)

    def lay_out(self, known: Record | None, batch: int | None, chunk_size: int | None) -> tuple[Plan, Record]:
        """The plan, with the batch that fits these devices unless it is given, and its record."""
        plan = prepare.lay_out(self.ready, known, batch, chunk_size)
        return plan, Record.of(plan, self.ready.output, self.ready.shared["model"])

    def run_chunk(self, chunk: Chunk) -> tuple[list[Event], Usage]:
        """Samples a chunk and commits it, unless it is at the output already.

        Returns what has happened meanwhile, and how the devices have spent their time.
        """
        if self.ready.output.finished(chunk, verify=True):
            return [Kept(chunk.id, len(chunk))], self.sampler.usage
        answer = self.answers[chunk.id] = Future()
        self.asked.put(chunk)
        return answer.result(), self.sampler.usage

    def _sample(self) -> None:
        while True:
            try:
                self.sampler.run(itertools.chain([self.asked.get()], self._more()))
            except Exception as error:
                for answer in self.answers.values():
                    answer.set_exception(error)
                self.answers.clear()

    def _more(self) -> Iterator[Chunk]:
        """The chunks that are asked for, until there are none."""
        with suppress(queue.Empty):
            while True:
                yield self.asked.get(timeout=PATIENCE_SECONDS)

    def _emit(self, event: Event) -> None:
        self.events.put(event)
        if isinstance(event, Written):
            self.answers.pop(event.chunk).set_result([*self._happened()])

    def _happened(self) -> Iterator[Event]:
        """The events that no answer has had yet."""
        with suppress(queue.Empty):
            while True:
                yield self.events.get_nowait()
