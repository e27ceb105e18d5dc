"""How a job is cut into chunks that are written whole, each of requests that share a program.

A chunk has whole units of fixed composition (`sdjax.engine.Unit`), so that the output of a plan is the same however
many devices and processes there are.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sdjax.engine import Group, grouped
from sdjax.request import ID_BYTES, Request

CHUNK_SIZE = 64
BYTES_PER_PIXEL = {"png": 1.6, "webp": 0.2, "jpeg": 0.4}
"""Of a photograph of 512 x 512, roughly: drawings take less, noise more"""

_END = b"\0"  # between the parts of what is hashed


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive pictures of one group that are written together or not at all; holds all that a worker needs."""

    id: str
    """20 hexadecimal digits of BLAKE2b of the items' ids in order, the batch and the format"""
    group: Group
    batch: int
    indices: tuple[int, ...]
    """each picture's place in the job"""
    ids: tuple[str, ...]
    items: tuple[Request, ...]

    def __len__(self) -> int:
        return len(self.items)


class Plan(Sequence[Chunk]):
    """The chunks of a job, group by group. They are made when asked for; what is kept is 18 bytes a picture.

    groups: the places in the job of each group's items. item_ids: ID_BYTES for each item, in the order of the job.
    chunk_size: the most pictures of a chunk, made a multiple of batch. format: goes into the ids of chunks.
    """

    def __init__(
        self,
        items: Sequence[Request],
        groups: Mapping[Group, np.ndarray],
        item_ids: bytes,
        batch: int,
        chunk_size: int,
        format: str,
    ):
        if batch < 1 or chunk_size < 1:
            raise ValueError(f"batch and chunk_size must be 1 or more, not {batch} and {chunk_size}")
        self.items, self.groups, self.batch, self.format = items, groups, batch, format
        self.chunk_size = max(chunk_size // batch, 1) * batch
        self._item_ids = item_ids
        self._starts = [
            (group, start) for group, own in groups.items() for start in range(0, len(own), self.chunk_size)
        ]
        self.ids = [self._id(place) for place in range(len(self._starts))]
        """of the chunks"""

    def rebatched(self, batch: int, chunk_size: int) -> "Plan":
        """The plan of the same job for another batch."""
        return Plan(self.items, self.groups, self._item_ids, batch, chunk_size, self.format)

    def pictures(self, places: Iterable[int]) -> int:
        """How many pictures the chunks at these places have."""
        return sum(len(self._indices(place)) for place in places)

    def _indices(self, place: int) -> list[int]:
        group, start = self._starts[place]
        return self.groups[group][start : start + self.chunk_size].tolist()

    def _ids_of_items(self, place: int) -> list[bytes]:
        return [self._item_ids[i * ID_BYTES : (i + 1) * ID_BYTES] for i in self._indices(place)]

    def _id(self, place: int) -> str:
        hashed = _END.join([b"".join(self._ids_of_items(place)), str(self.batch).encode(), self.format.encode()])
        return hashlib.blake2b(hashed, digest_size=ID_BYTES).hexdigest()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: int | slice) -> "Chunk | list[Chunk]":
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        indices, (group, _) = self._indices(place), self._starts[place]
        ids = tuple(id.hex() for id in self._ids_of_items(place))
        items = tuple(self.items[i] for i in indices)
        return Chunk(self.ids[place], group, self.batch, tuple(indices), ids, items)


def plan(
    items: Sequence[Request],
    fingerprint: str,
    batch: int,
    chunk_size: int = CHUNK_SIZE,
    *,
    format: str = "files",
    prompt_chunks: Callable[[Request], int] = lambda item: 1,
    rows: Callable[[Request], int] = lambda item: item.num_inference_steps,
    loras: Mapping[str, str] | None = None,
) -> Plan:
    """Cuts the items into chunks, in the order of `engine.grouped`.

    fingerprint: of the model. batch: items a device takes at once. prompt_chunks, rows: of an item, see `grouped`.
    loras: a hash of the content of each LoRA file (`job.lora_digests`), which goes into the ids of items that use it.
    """
    groups, ids = grouped(items, prompt_chunks, rows), bytearray()
    for item in items:
        model = " ".join([fingerprint, *(loras[path] for path, _ in item.loras)]) if loras else fingerprint
        ids += bytes.fromhex(item.id(model))
    return Plan(items, groups, bytes(ids), batch, chunk_size, format)


@dataclass(frozen=True)
class Estimate:
    """What a plan takes, for `--dry-run`."""

    items: int
    chunks: int
    units: int
    compilations: int
    """sets of programs: distinct `Group.shape`"""
    bytes: int
    """of the pictures, within a factor of 2 or so: see BYTES_PER_PIXEL"""
    seconds: float | None
    """None where the rate is not known"""


def estimate(
    plan: Plan,
    picture_format: str = "png",
    rate: float | None = None,
    size: Callable[[Request], tuple[int, int]] = lambda item: item.size,
) -> Estimate:
    """plan: of items that `job.check` filled in. picture_format: png, webp or jpeg. rate: pictures a second. size: of
    the picture of an item."""
    counts = {group: len(places) for group, places in plan.groups.items()}
    pixels = sum(math.prod(size(plan.items[places[0]])) * len(places) for places in plan.groups.values())
    return Estimate(
        items=len(plan.items),
        chunks=len(plan),
        units=sum(-(-count // plan.batch) for count in counts.values()),
        compilations=len({group.shape for group in counts}),
        bytes=math.ceil(pixels * BYTES_PER_PIXEL[picture_format]),
        seconds=None if rate is None else len(plan.items) / rate,
    )
