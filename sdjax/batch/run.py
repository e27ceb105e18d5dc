"""A job from its items to its pictures: prepared, locked, sampled, watched."""

import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, NamedTuple

from sdjax.batch import interruption, job, memory, record, sheets
from sdjax.batch.fingerprint import fingerprint
from sdjax.batch.interruption import Interrupted, Stop
from sdjax.batch.job import Items
from sdjax.batch.lock import Lock
from sdjax.batch.output import Output, open_target
from sdjax.batch.plan import Plan, plan, prompt_chunk_counter
from sdjax.batch.progress import Progress, Tally
from sdjax.batch.record import Record
from sdjax.batch.sampling import Halved, Sampler, Usage
from sdjax.options import EMBEDDED_GUIDANCE
from sdjax.pipeline import StableDiffusionPipeline

CHUNK_SIZES = {"files": 64, "webdataset": 512}
LOCK = ".sdjax-lock.json"
CHECKERS = 8  # threads that read what is there already
TICK_SECONDS = 0.2

Job = str | os.PathLike | Iterable[Mapping[str, Any]] | Items
Model = str | os.PathLike | StableDiffusionPipeline | None


class Kept(NamedTuple):
    """A chunk of an earlier run is as it was written."""

    pictures: int


class Altered(NamedTuple):
    """A file of a chunk of an earlier run is not as it was written; the chunk is made again."""

    chunk: str


@dataclass(frozen=True)
class Summary:
    """What a run did."""

    url: str
    pictures: int
    """of the job, all of which are at the target"""
    made: int
    kept: int
    """of an earlier run"""
    nsfw: int
    """of those made, which the safety checker turned black"""
    seconds: float
    devices: int
    batch: int
    """pictures that a device sampled at once"""
    idle_share: float
    """of the devices' time after compilation"""
    sheets: Sequence[str]
    """contact sheets"""


@dataclass(frozen=True)
class Prepared:
    """A job that is checked and can start."""

    items: Items
    pipe: StableDiffusionPipeline
    output: Output
    model: str
    fingerprint: str
    shared: Mapping[str, Any]
    """settings of all its pictures"""


def run(
    job: Job,
    out: str | os.PathLike,
    *,
    model: Model = None,
    batch: int | None = None,
    chunk_size: int | None = None,
    format: str = "files",
    image_format: str = "png",
    grid: bool = False,
    on_progress: Callable[[Progress], Any] | None = None,
    embeddings: Sequence[str | os.PathLike] = (),
    **options: Any,
) -> Summary:
    """Makes the pictures of a job that are not at the target yet.

    job: a file, its lines as mappings, or items (see `sdjax.batch.job.read`). out: a folder or a URL. model: as
    `StableDiffusionPipeline.from_pretrained` takes it, with these options, or a pipeline; None: the embedded model.
    batch: pictures that a device samples at once, a power of two; None: that of an earlier run, or what fits the devices.
    chunk_size: the most pictures that are written together. format: "files" or "webdataset"; image_format: "png", "webp"
    or "jpeg". grid: contact sheets of the sweeps. on_progress: called with a `Progress` after everything that happens.
    embeddings: textual inversions.
    Raises ValueError for a job, or a target, that is not right, before anything is written; LockedError, an OSError,
    where another run is at it; OSError where pictures cannot be written; Interrupted after SIGINT or SIGTERM.
    """
    ready = prepare(job, out, model=model, format=format, image_format=image_format, embeddings=embeddings, **options)
    if grid:
        sheets.check(ready.items)
    begun, target = time.perf_counter(), ready.output.target
    target.probe()
    with Lock(target.fs, target.path(LOCK)) as lock, interruption.requested() as stop:
        if lock.note:
            warnings.warn(f"{target.url}: {lock.note}", stacklevel=2)
        tally = Tally(len(ready.items), ready.pipe.mesh.size, target.shown)
        work = _Work(ready, tally, lock, stop)
        work.supervise(lambda tell: work.sample(batch, chunk_size, tell), on_progress)
        drawn = sheets.write(ready.items, ready.output) if grid else []
    return Summary(
        url=target.url,
        pictures=len(ready.items),
        made=tally.written,
        kept=tally.kept,
        nsfw=tally.nsfw,
        seconds=time.perf_counter() - begun,
        devices=ready.pipe.mesh.size,
        batch=work.batch,
        idle_share=work.usage.idle_share,
        sheets=drawn,
    )


def prepare(
    job_: Job,
    out: str | os.PathLike,
    *,
    model: Model = None,
    format: str = "files",
    image_format: str = "png",
    embeddings: Sequence[str | os.PathLike] = (),
    **options: Any,
) -> Prepared:
    """The job read and checked against its model, with nothing written; see `run`."""
    suits = {"guidance_scale": EMBEDDED_GUIDANCE} if model is None else {}
    items = job_ if isinstance(job_, Items) else job.read(job_, suits)
    output = Output(open_target(out), format, image_format, "")
    pipe = model
    if not isinstance(model, StableDiffusionPipeline):
        pipe = StableDiffusionPipeline.from_pretrained(model, **options)
    words = {str(path): pipe.load_textual_inversion(path) for path in embeddings}
    items = job.check(items, pipe)
    name = type(model).__name__ if model is pipe else str(model or "embedded")
    shared = {"model": name, "dtype": str(pipe.unet.conv_in.kernel.dtype), "version": version("sdjax")}
    more = {"embeddings": words, **{key: str(value) for key, value in options.items() if value and key != "dtype"}}
    shared |= {key: value for key, value in more.items() if value}
    print_ = fingerprint(pipe)
    return Prepared(items, pipe, replace(output, fingerprint=print_), name, print_, shared)


def lay_out(
    ready: Prepared, known: Record | None = None, batch: int | None = None, chunk_size: int | None = None
) -> Plan:
    """The plan of a job: with the batch and the chunks of an earlier run, where nothing else is asked for."""
    output = ready.output
    layout = f"{output.layout} {output.format}"
    chunk_size = chunk_size or (known.chunk_size if known else CHUNK_SIZES[output.layout])
    counter = prompt_chunk_counter(list(ready.pipe.tokenizers.values()))
    loras = job.lora_digests(ready.items)
    batch = batch or (known.batch if known else None)
    draft = plan(
        ready.items, ready.fingerprint, batch or 1, chunk_size, format=layout, prompt_chunks=counter, loras=loras
    )
    if batch:
        return draft
    members = dict(zip(draft.groups, draft._members, strict=True))
    shapes = {group.shape: ready.items[own.indices[0]] for group, own in members.items()}
    most = -(-max(len(own.indices) for own in members.values()) // ready.pipe.mesh.size)
    batch = memory.per_device_batch(ready.pipe, list(shapes.values()), 2 ** (most - 1).bit_length())
    return Plan(ready.items, batch, max(chunk_size // batch, 1) * batch, layout, members)


def missing(
    plan: Plan, output: Output, places: Sequence[int], tell: Callable[[NamedTuple], None] = lambda event: None
) -> Iterator["Any"]:
    """The chunks at these places of the plan that are not at the output as they were written.

    Those that were never written come first; meanwhile threads read the others.
    """
    there = output.committed()
    present = [place for place in places if plan.ids[place] in there]

    def check(place: int) -> bool:
        chunk = plan[place]
        is_finished = output.finished(chunk)
        tell(Kept(len(chunk)) if is_finished else Altered(chunk.id))
        return is_finished

    with ThreadPoolExecutor(CHECKERS, "sdjax check") as pool:
        try:
            checks = [pool.submit(check, place) for place in present]
            yield from (plan[place] for place in places if plan.ids[place] not in there)
            yield from (plan[place] for place, done in zip(present, checks, strict=True) if not done.result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _Work:
    """The part of a run that holds the lock: a thread works, the caller's watches for signals and reports."""

    def __init__(self, ready: Prepared, tally: Tally, lock: Lock, stop: Stop):
        self.ready, self.tally, self.lock, self.stop = ready, tally, lock, stop
        self.batch, self.usage = 0, Usage()

    def sample(self, batch: int | None, chunk_size: int | None, tell: Callable[[NamedTuple], None]) -> None:
        ready, target = self.ready, self.ready.output.target
        known = record.read(target)
        plan = lay_out(ready, known, batch, chunk_size)
        here = Record(
            ready.model,
            ready.fingerprint,
            len(plan.items),
            plan.batch,
            plan.chunk_size,
            ready.output.layout,
            ready.output.format,
            tuple(plan.ids),
        )
        if known is None:
            here.write(target)
        else:
            here.check(known, target.url)
            if known.made_with != here.made_with:
                made = ", ".join(f"{key} {value}" for key, value in known.made_with.items())
                tell(Noted(f"{target.url} was begun with {made}: what follows may differ by rounding"))
        target.sweep()
        self.batch = plan.batch
        sampler = Sampler(ready.pipe, ready.output, ready.shared, tell)
        self.usage = sampler.usage
        sampler.run(missing(plan, ready.output, range(len(plan)), tell), self.stop.event)

    def supervise(self, work: Callable[[Callable], None], on_progress: Callable[[Progress], Any] | None) -> None:
        """Runs work(tell) in a thread. Raises what it raises, and Interrupted where it was told to stop."""
        events: queue.SimpleQueue[NamedTuple | None] = queue.SimpleQueue()
        failed: list[BaseException] = []

        def body() -> None:
            try:
                work(events.put)
            except BaseException as error:
                failed.append(error)
            finally:
                events.put(None)

        thread = threading.Thread(target=body, name="sdjax batch", daemon=True)
        thread.start()
        try:
            while (event := self._next(events)) is not None:
                if isinstance(event, Halved):
                    self.batch = event.batch
                    warnings.warn(f"a device ran out of memory: going on in batches of {event.batch}", stacklevel=4)
                if isinstance(event, Noted):
                    warnings.warn(event.text, stacklevel=4)
                progress = self.tally.add(event)
                if on_progress is not None:
                    on_progress(progress)
                if self.stop.is_over:
                    raise self._interrupted(is_busy=True)
                if self.lock.lost:
                    raise OSError(f"{self.ready.output.target.url}: another run has taken it over")
        finally:
            self.stop.event.set()
        thread.join()
        ...
