"""How a job is reported: a live line, lines of JSON, a summary, a plan, and the status of a target."""

import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from sdjax.batch import lock, manifest, record
from sdjax.batch.output import open_target, require
from sdjax.batch.plan import Estimate
from sdjax.batch.processes import lock_names
from sdjax.batch.progress import Made, Progress
from sdjax.pictures.finite import ADVICE
from sdjax.runtime.progress import duration

if TYPE_CHECKING:
    from sdjax.batch.runner import Summary

RANGES_SHOWN = 8
SHOWN = ("done", "total", "per_second", "per_device", "seconds_left")
"""Of the progress, with each event"""

Report = Callable[[Progress], None]


def json_line(event: str, **values: Any) -> None:
    """One line of JSON on stdout."""
    print(json.dumps({"event": event, **values}, ensure_ascii=False, allow_nan=False), flush=True)


def log_json(progress: Progress) -> None:
    """A line of JSON for everything but single pictures."""
    if progress.event is None or isinstance(progress.event, Made):
        return
    known = {name: getattr(progress, name) for name in SHOWN}
    json_line(type(progress.event).__name__.lower(), **progress.event._asdict(), **known)


@contextmanager
def live() -> Iterator[Report]:
    """A function that keeps a line on stderr up to date; without a terminal it prints one now and then."""
    if not sys.stderr.isatty():  # rich takes FORCE_COLOR for one, which kernels of notebooks set
        yield _Sparse()
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(stderr=True), refresh_per_second=4, transient=True) as line:
        yield lambda progress: line.update(Text(_line(progress), no_wrap=True, overflow="ellipsis"))


class _Sparse:
    """A line for each tenth of the job."""

    def __init__(self) -> None:
        self._tenth = 0

    def __call__(self, progress: Progress) -> None:
        tenth = 10 * progress.done // max(1, progress.total)
        if tenth > self._tenth:
            self._tenth = tenth
            print(_line(progress), file=sys.stderr, flush=True)


def _line(progress: Progress) -> str:
    parts = [f"{progress.done + progress.waiting:,} of {progress.total:,} pictures"]
    if progress.per_second:
        parts.append(f"{_rate(progress.per_second)} a second")
        if progress.devices > 1:
            parts.append(f"{_rate(progress.per_device)} each of {progress.devices} devices")
    if progress.seconds_left is not None:
        parts.append(f"{duration(progress.seconds_left)} left")
    return ", ".join(parts) + (f"  {progress.last}" if progress.last else "")


def summary(done: "Summary") -> str:
    """What a run did, in a few lines."""
    lines = [
        f"{done.pictures - len(done.failed):,} pictures at {done.url}: {done.made:,} made, {done.kept:,} there before"
    ]
    if done.made:
        rate, devices = _rate(done.per_second), f"{done.devices} device{'s' * (done.devices > 1)}"
        lines.append(
            f"{duration(done.seconds)}, {rate} a second on {devices} in batches of {done.batch}; "
            f"devices idle {done.idle_share:.1%} of the time"
        )
    if done.nsfw:
        lines.append(f"the safety checker made {done.nsfw:,} of them black")
    return "\n".join([*lines, *done.sheets])


def failures(done: "Summary") -> str:
    """The pictures that are not finite, in a line."""
    return (
        f"{len(done.failed):,} of {done.pictures:,} pictures not finite, and not at {done.url}: "
        f"{_shown(_ranges(done.failed))}; {ADVICE}; the same job again makes them anew"
    )


def plan(estimate: Estimate, batch: int, devices: int, url: str, there: int) -> str:
    """The text of `--dry-run`."""
    missing = 1 - there / estimate.chunks
    time = "unknown" if estimate.seconds is None else f"about {duration(estimate.seconds * missing)}"
    lines = {
        "pictures": f"{estimate.items:,}",
        "batches": f"{estimate.units:,} of {batch}, {devices} at a time",
        "chunks": f"{estimate.chunks:,}, {there:,} of them at {url} already",
        "compilations": f"{estimate.compilations}",
        "bytes": f"about {decimal(estimate.bytes)}",
        "time": f"{time} for what is missing",
    }
    return "\n".join(f"{name:<14}{text}" for name, text in lines.items())


@dataclass(frozen=True)
class Status:
    """What is at a target, by its manifest: the files themselves are read by the next run."""

    url: str
    model: str
    pictures: int
    done: int
    chunks: int
    chunks_done: int
    missing: Sequence[tuple[int, int]]
    """(first, last) of each run of pictures that are not there, by their places in the job"""
    bytes: int
    nsfw: int
    device_seconds: float
    running: str | None
    """who is at work"""


def status(out: str | os.PathLike) -> Status:
    """Raises FileNotFoundError where there is no job, ValueError where its record or its manifest is damaged.

    Also ValueError where PyArrow is not installed.
    """
    require("pyarrow")
    target = open_target(out)
    known = record.read(target)
    if known is None:
        raise FileNotFoundError(f"{target.url}: there is no job here, no {record.NAME}")
    holders = [lock.holder_of(target.fs, target.path(name)) for name in lock_names(target)]
    table = manifest.read(target.fs, target.root)
    counts = manifest.summary(table)
    there = set(table["index"].to_pylist())
    return Status(
        url=target.url,
        model=known.model,
        pictures=known.pictures,
        done=len(there),
        chunks=len(known.chunks),
        chunks_done=len(manifest.chunks(target.fs, target.root) & {*known.chunks}),
        missing=_ranges(place for place in range(known.pictures) if place not in there),
        bytes=counts["bytes"] or 0,
        nsfw=counts["nsfw"] or 0,
        device_seconds=counts["seconds"] or 0.0,
        running="; ".join(map(str, filter(lock.is_alive, holders))) or None,
    )


def status_text(found: Status) -> str:
    """The text of `--status`."""
    percent = found.done / found.pictures if found.pictures else 1
    lines = {
        "job": f"{found.url}, model {found.model}",
        "done": f"{found.done:,} of {found.pictures:,} pictures ({percent:.1%}), {decimal(found.bytes)}",
        "chunks": f"{found.chunks_done:,} of {found.chunks:,}",
        "missing": _shown(found.missing) or "nothing",
        "running": found.running or "no",
    }
    if found.nsfw:
        lines["flagged"] = f"{found.nsfw:,} by the safety checker"
    return "\n".join(f"{name:<14}{text}" for name, text in lines.items())


def _ranges(places: Iterable[int]) -> list[tuple[int, int]]:
    """[1, 2, 3, 7] -> [(1, 3), (7, 7)]"""
    found = []
    for _, same in itertools.groupby(enumerate(places), lambda pair: pair[1] - pair[0]):
        run = [place for _, place in same]
        found.append((run[0], run[-1]))
    return found


def _shown(pictures: Sequence[tuple[int, int]]) -> str:
    shown = [f"{first:,}" if first == last else f"{first:,}-{last:,}" for first, last in pictures[:RANGES_SHOWN]]
    more = len(pictures) - RANGES_SHOWN
    return ", ".join(shown) + (f" and {more:,} more ranges" if more > 0 else "")


def _rate(per_second: float) -> str:
    return f"{per_second:.3g}"
