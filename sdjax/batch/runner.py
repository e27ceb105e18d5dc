"""A job from its items to its pictures: locked, sampled, watched."""

import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from sdjax.batch import interruption, record, sheets
from sdjax.batch.interruption import Interrupted, Stop, UnfinishedError
from sdjax.batch.output import Output, open_target
from sdjax.batch.plan import Chunk, Plan
from sdjax.batch.prepare import Embeddings, JobSource, Model, Prepared, check_batch, lay_out, prepare
from sdjax.batch.processes import ALONE, Process
from sdjax.batch.progress import Altered, Emit, Event, Halved, Kept, Noted, Planned, Progress, Tally
from sdjax.batch.record import Record
from sdjax.batch.sampling import Sampler
from sdjax.request.values import one_of
from sdjax.runtime.usage import Usage

if TYPE_CHECKING:
    from sdjax.batch.ray_cluster import Cluster

ENGINES = ("local", "ray")
CHECKERS = 8  # threads that look at what an earlier run wrote
TICK_SECONDS = 0.2


@dataclass(frozen=True)
class Summary:
    """What a run did; all pictures of the job but those that failed are at the target."""

    url: str
    pictures: int
    made: int
    kept: int
    """of earlier runs"""
    nsfw: int
    """of those made, that the safety checker turned black"""
    failed: Sequence[int]
    """the places in the job of pictures that are not finite, and not written: a further run makes their chunks again"""
    seconds: float
    devices: int
    batch: int
    """pictures that a device samples at once"""
    per_second: float
    """pictures, from the first call of the devices on, compilation left out"""
    idle_share: float
    """of that time in which the devices had nothing to do"""
    sheets: Sequence[str]
    """paths or URLs of the contact sheets"""


def run(
    job: JobSource,
    out: str | os.PathLike,
    *,
    model: Model = None,
    batch: int | None = None,
    chunk_size: int | None = None,
    format: str = "files",
    image_format: str = "png",
    embeddings: Embeddings = (),
    grid: bool = False,
    verify: bool = False,
    engine: str = "local",
    process: Process = ALONE,
    on_progress: Callable[[Progress], Any] | None = None,
    **options: Any,
) -> Summary:
    """Makes those pictures of a job that are not at the target yet, on all devices of this process or of a cluster.

    job: a file, its lines as mappings, or what `sdjax.batch.job.read` made of them. out: a folder, or a URL that fsspec
    knows. model: a pipeline, or what `StableDiffusionPipeline.from_pretrained` takes, with these options; None: the
    embedded model. Options may also be ip_adapters, files, and image_encoder_folder, as of its `load_ip_adapter`.
    batch: pictures that a device samples at once, a power of two; None: as an earlier run, or what fits the devices.
    chunk_size: the most pictures that are written together. format: "files" or "webdataset". image_format: "png",
    "webp" or "jpeg". embeddings: textual inversions, or {textual inversion: the word for it}. grid: contact sheets of
    the sweeps. verify: read what earlier runs wrote and compare its SHA-256; otherwise its size is trusted.
    engine: "local", or "ray": see `sdjax.batch.ray_cluster.Cluster`. process: which this is of several processes that
    have joined (`sdjax.batch.processes.join`); it makes its share of the pictures.
    on_progress: called with a `Progress` whenever something happens, a few times a second.
    Raises ValueError for a job that is not right or a target that has another one, before anything is written;
    LockedError, an OSError, where another run is at work; OSError where the target cannot be written to, and
    UnfinishedError, another one, where that is so later, or pictures that were there are gone; Interrupted, a
    KeyboardInterrupt, within 10 seconds of SIGTERM or SIGINT.
    """
    check_batch(batch)
    one_of("engine", engine, ENGINES)
    open_target(out).check()
    options |= {"model": model, "format": format, "image_format": image_format, "embeddings": embeddings}
    crew = _cluster(job, out, options, process) if engine == "ray" else _Local(prepare(job, out, **options))
    if grid:
        sheets.check(crew.items)
    target, work = crew.output.target, _Work(crew, process, verify)
    begun, tally = time.perf_counter(), Tally(len(crew.items), crew.devices, target.shown)
    with process.locked(target) as lock, interruption.requested() as stop:
        if lock.note:
            warnings.warn(f"{target.url}: {lock.note}", stacklevel=2)
        try:
            for event in _watched(lambda emit: work(batch, chunk_size, stop.event, emit), stop):
                match event:
                    case Halved():
                        work.batch = event.batch
                        warnings.warn(f"a device ran out of memory: batches of {event.batch} from now on", stacklevel=2)
                    case Noted():
                        warnings.warn(event.text, stacklevel=2)
                progress = tally.add(event)
                if on_progress is not None:
                    on_progress(progress)
        except OSError as error:
            if work.plan is None:
                raise  # nothing was begun
            had = f"{tally.done:,} of {tally.total:,} pictures were at the target"
            raise UnfinishedError(f"{error}; {had}; the same command makes the others") from error
        if stop.signum is not None and tally.done + len(tally.failed) < tally.total:
            raise Interrupted(stop.signum, tally.done, tally.total, target.url, is_busy=stop.is_over)
        if tally.made and (lost := work.lost(tally.failed)):
            gone = f"{lost:,} of {tally.total:,} pictures were removed while the job ran"
            raise UnfinishedError(f"{target.url}: {gone}; the same command makes them again")
        is_whole = not tally.failed and work.is_all_there()
        drawn = sheets.write(crew.items, crew.output) if grid and is_whole else []
    usage = crew.usage
    return Summary(
        url=target.url,
        pictures=tally.total,
        made=tally.written,
        kept=tally.kept,
        nsfw=tally.nsfw,
        failed=sorted(tally.failed),
        seconds=time.perf_counter() - begun,
        devices=tally.devices,
        batch=work.batch,
        per_second=tally.written / usage.seconds if usage.seconds else 0.0,
        idle_share=usage.idle_share,
        sheets=drawn,
    )


class _Local:
    """All devices of this process."""

    def __init__(self, ready: Prepared):
        self.ready, self.items, self.output, self.devices = ready, ready.items, ready.output, ready.pipe.mesh.size
        self.usage = Usage()

    def lay_out(self, known: Record | None, batch: int | None, chunk_size: int | None) -> tuple[Plan, Record]:
        plan = lay_out(self.ready, known, batch, chunk_size)
        return plan, Record.of(plan, self.output, self.ready.shared["model"])

    def sample(self, chunks: Iterable[Chunk], stop: threading.Event, emit: Emit) -> None:
        sampler = Sampler(self.ready.pipe, self.output, self.ready.shared, emit)
        self.usage = sampler.usage
        sampler.run(chunks, stop)


def _cluster(job: JobSource, out: str | os.PathLike, options: Mapping[str, Any], process: Process) -> "Cluster":
    if process.count > 1:
        raise ValueError('the engine "ray" finds the hosts itself: start one process')
    from sdjax.batch.ray_cluster import Cluster

    return Cluster(job, out, options)


class _Work:
    """What is done while the lock is held."""

    def __init__(self, crew: "_Local | Cluster", process: Process, verify: bool):
        self.crew, self.process, self.verify, self.batch = crew, process, verify, 0
        self.plan: Plan | None = None

    def is_all_there(self) -> bool:
        """Whether the other processes' chunks are at the target as well."""
        return self.process.count == 1 or self.crew.output.committed() >= {*self.plan.ids}

    def lost(self, failed: Sequence[int]) -> int:
        """How many pictures of its share are gone, not counting chunks with failed ones; in a store by the manifest."""
        plan, output, share = self.plan, self.crew.output, self.process.share(len(self.plan))
        if output.target.is_local:
            gone = missing(plan, output, share)
        else:
            there = output.committed()
            gone = (plan[place] for place in share if plan.ids[place] not in there)
        return sum(len(chunk) for chunk in gone if {*failed}.isdisjoint(chunk.indices))

    def __call__(self, batch: int | None, chunk_size: int | None, stop: threading.Event, emit: Emit) -> None:
        output = self.crew.output
        known = record.read(output.target)
        plan, here = self.crew.lay_out(known, batch, chunk_size)
        if known is None:
            here.write(output.target)
        else:
            here.check(known, output.target.url)
            if known.made_with != here.made_with:
                made_with = ", ".join(f"{name} {value}" for name, value in known.made_with.items())
                emit(Noted(f"{output.target.url} was begun with {made_with}: what follows may differ by rounding"))
        if self.process.is_first:
            output.target.sweep()
        self.plan, self.batch = plan, plan.batch
        share = self.process.share(len(plan))
        if self.process.count > 1:
            emit(Planned(plan.pictures(share)))
        self.process.begun(output.target)
        self.crew.sample(missing(plan, output, share, emit, verify=self.verify), stop, emit)
        if self.process.is_first and output.target.read(record.NAME) is None:  # removed, with what lay beside it
            here.write(output.target)


def missing(
    plan: Plan, output: Output, places: Sequence[int], emit: Emit = lambda event: None, *, verify: bool = False
) -> Iterator[Chunk]:
    """The chunks at these places of the plan that are not at the output as they were written.

    Those without a part in the manifest come first; meanwhile threads look at the files of the others, with `verify`
    at their content.
    """
    there = output.committed()
    present = [place for place in places if plan.ids[place] in there]

    def check(place: int) -> bool:
        chunk = plan[place]
        is_finished = output.finished(chunk, verify=verify)
        emit(Kept(chunk.id, len(chunk)) if is_finished else Altered(chunk.id))
        return is_finished

    pool = ThreadPoolExecutor(CHECKERS, "sdjax check")
    try:
        checks = [pool.submit(check, place) for place in present]
        yield from (plan[place] for place in places if plan.ids[place] not in there)
        yield from (plan[place] for place, done in zip(present, checks, strict=True) if not done.result())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _watched(work: Callable[[Emit], None], stop: Stop) -> Iterator[Event | None]:
    """Runs work(emit) in a thread and yields what it emits, and None now and then, until it ends or `stop` is over.

    Python's signal handlers run here, however long the thread waits for a device or a compiler. Raises what the work
    raises; however this ends, the work begins no further batch.
    """
    events: queue.SimpleQueue[Event | _End] = queue.SimpleQueue()

    def body() -> None:
        try:
            work(events.put)
        except BaseException as error:
            events.put(_End(error))
        else:
            events.put(_End(None))

    threading.Thread(target=body, name="sdjax batch", daemon=True).start()
    try:
        while not stop.is_over:
            try:
                event = events.get(timeout=TICK_SECONDS)
            except queue.Empty:
                event = None
            if isinstance(event, _End):
                if event.error is not None:
                    raise event.error
                return
            yield event
    finally:
        stop.event.set()


class _End(NamedTuple):
    error: BaseException | None
