"""Units of requests in calls of a pipeline over all its devices.

A batch is on its way while the last is fetched. What a unit's pictures are depends on its requests and their places
alone, never on the device that samples it or on what is sampled beside it.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax

from sdjax.engine.groups import Unit
from sdjax.engine.lora_sets import LoraSets
from sdjax.engine.sampled import Sampled, fetched, in_uint8
from sdjax.runtime.lowering import DoesNotFit, is_out_of_memory
from sdjax.runtime.usage import Dispatch, Usage

if TYPE_CHECKING:
    from sdjax.pipeline import StableDiffusionPipeline, StableDiffusionPipelineOutput

AHEAD = 1  # calls that wait on the devices while one is computed


@dataclass
class _Call:
    """Units of one group and batch, at most one for each device."""

    units: list[Unit]
    fetched: Future | None = None

    @property
    def is_lost(self) -> bool:
        """Waits until it is fetched; whether it failed, or was not dispatched."""
        return self.fetched is None or self.fetched.exception() is not None


class Engine:
    """Samples requests with a pipeline, over all devices of its mesh.

    on_halved: called with the batch that a device is given from then on, after one ran out of memory.
    """

    def __init__(self, pipe: "StableDiffusionPipeline", on_halved: Callable[[int], None] = lambda batch: None):
        self.pipe, self.usage, self._on_halved = pipe, Usage(), on_halved
        self._loras = LoraSets(pipe)
        self._most: int | None = None  # pictures of a device at once, after it ran out of memory
        self._compiled: set[tuple] = set()

    def run(
        self, units: Iterable[Unit], deliver: Callable[[list[Sampled]], Any], stop: threading.Event | None = None
    ) -> None:
        """Samples all units; after `stop` is set, those that are on the devices already.

        units: asked for when a device can take some; those in turn that have one group and batch share calls. deliver:
        is given the pictures of each call in a thread of its own, so that it waits for no further unit.
        Where a device runs out of memory, the batch is halved for all that is not delivered; the LoRAs are set as each
        group has them, and afterwards as they were. Raises ValueError where one picture does not fit.
        """
        stop, shown = stop or threading.Event(), self.pipe.shows_progress
        self.pipe.set_progress_bar_config(disable=True)
        fetcher = ThreadPoolExecutor(1, "sdjax fetch")
        try:
            wanted = itertools.takewhile(lambda _: not stop.is_set(), units)
            self._run(self._calls(wanted), deliver, stop, fetcher)
        finally:
            fetcher.shutdown(wait=False, cancel_futures=True)
            self.pipe.set_progress_bar_config(disable=not shown)
            self._loras.restore()

    def _run(
        self,
        calls: Iterator[list[Unit]],
        deliver: Callable[[list[Sampled]], Any],
        stop: threading.Event,
        fetcher: ThreadPoolExecutor,
    ) -> None:
        ready: deque[_Call] = deque()
        dispatched: deque[_Call] = deque()
        while True:
            if not ready and not stop.is_set():
                ready.extend(self._fitting(next(calls, [])))
            call = ready.popleft() if ready and not stop.is_set() else None
            try:
                if call is not None:
                    dispatched.append(call)
                    call.fetched = fetcher.submit(self._fetch, call.units, *self._dispatch(call.units), deliver)
                while len(dispatched) > (AHEAD if call else 0):
                    dispatched[0].fetched.result()
                    dispatched.popleft()
            except (jax.errors.JaxRuntimeError, DoesNotFit) as error:
                if not is_out_of_memory(error):
                    raise
                lost = [unit for call in dispatched if call.is_lost for unit in call.units]
                dispatched.clear()
                self._halve(lost[0], error)
                ready.extendleft(reversed(self._fitting(lost)))
            else:
                if call is None:
                    return

    def _halve(self, unit: Unit, error: Exception) -> None:
        if unit.batch == 1:
            if isinstance(error, DoesNotFit):
                raise error
            size = f"{unit.group.width}x{unit.group.height}"
            raise DoesNotFit(f"a picture of {size} does not fit into the memory of a device, even by itself") from error
        self._most = unit.batch // 2
        self._on_halved(self._most)

    def _calls(self, units: Iterable[Unit]) -> Iterator[list[Unit]]:
        """A unit for each device, or fewer at the end of a group."""
        for _, same in itertools.groupby(units, lambda unit: (unit.group, unit.batch)):
            while call := list(itertools.islice(same, self.pipe.mesh.size)):
                yield call

    def _fitting(self, units: Sequence[Unit]) -> list[_Call]:
        """The units in calls, none of more pictures for a device than fit."""
        halves = (half for unit in units for half in unit.halves(self._most))
        return [_Call(call) for call in self._calls(halves)]

    def _dispatch(self, units: Sequence[Unit]) -> tuple["StableDiffusionPipelineOutput", Dispatch]:
        """Being computed; pictures are uint8 [devices * batch H W 3]."""
        begun, before = time.perf_counter(), time.thread_time()
        padded = [*units, *units[-1:] * (self.pipe.mesh.size - len(units))]
        self._loras.use(units[0].group.loras)
        made = in_uint8(self.pipe.sample([item for unit in padded for item in unit.requests], output_type="jax"))
        key = (units[0].batch, *units[0].group.shape)
        compiles = key not in self._compiled
        self._compiled.add(key)
        return made, Dispatch(begun, time.perf_counter(), time.thread_time() - before, compiles)

    def _fetch(
        self,
        units: Sequence[Unit],
        made: "StableDiffusionPipelineOutput",
        call: Dispatch,
        deliver: Callable[[list[Sampled]], Any],
    ) -> None:
        """Waits for the devices, then delivers the pictures."""
        made.images.block_until_ready()
        seconds = self.usage.add(call) / sum(map(len, units))
        wanted = [
            (number * unit.batch + offset, tag)
            for number, unit in enumerate(units)
            for offset, tag in enumerate(unit.tags)
        ]
        deliver(fetched(made, wanted, seconds))
