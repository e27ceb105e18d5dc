"""How far a job is, from its target alone: no model is loaded."""

import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sdjax.batch import lock, manifest, record
from sdjax.batch.output import open_target, require
from sdjax.batch.processes import lock_names


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
    holders = [lock.parsed(target.read(name)) for name in lock_names(target)]
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
        missing=ranges(place for place in range(known.pictures) if place not in there),
        bytes=counts["bytes"] or 0,
        nsfw=counts["nsfw"] or 0,
        device_seconds=counts["seconds"] or 0.0,
        running="; ".join(lock.named(holder) for holder in holders if lock.is_alive(holder)) or None,
    )


def ranges(places: Iterable[int]) -> list[tuple[int, int]]:
    """[1, 2, 3, 7] -> [(1, 3), (7, 7)]"""
    found = []
    for _, same in itertools.groupby(enumerate(places), lambda pair: pair[1] - pair[0]):
        run = [place for _, place in same]
        found.append((run[0], run[-1]))
    return found
