"""How a job is cut into chunks that are written whole, each of requests that share a program.

A chunk has whole units of fixed composition (`sdjax.engine.Unit`), so that the output of a plan is the same however
many devices and processes there are.
"""

import hashlib
import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sdjax.engine import Group
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
    """The chunks of a job, group by group. They are made when asked for; what is kept is 18 bytes a picture."""

    def __init__(
        self, items: Sequence[Request], batch: int, chunk_size: int, format: str, groups: Mapping[Group, "_Members"]
    ):
        self.items, self.batch, self.chunk_size, self.groups = items, batch, chunk_size, tuple(groups)
        self.members = tuple(groups.values())
        self._places = [
            (number, start)
            for number, members in enumerate(self.members)
            for start in range(0, len(members.indices), chunk_size)
        ]
        self.ids = [self._id(*place, format) for place in self._places]
        """of the chunks"""

    def pictures(self, places: Iterable[int]) -> int:
        """How many pictures the chunks at these places have."""
        found = (self._places[place] for place in places)
        return sum(min(self.chunk_size, len(self.members[group].indices) - start) for group, start in found)

    def _id(self, group: int, start: int, format: str) -> str:
        content = self.members[group].ids[start * ID_BYTES : (start + self.chunk_size) * ID_BYTES]
        said = _END.join([bytes(content), str(self.batch).encode(), format.encode()])
        return hashlib.blake2b(said, digest_size=ID_BYTES).hexdigest()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int | slice) -> "Chunk | list[Chunk]":
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        group, start = self._places[index]
        members = self.members[group]
        indices = tuple(members.indices[start : start + self.chunk_size])
        ids = tuple(members.id(place) for place in range(start, start + len(indices)))
        items = tuple(self.items[i] for i in indices)
        return Chunk(self.ids[index], self.groups[group], self.batch, indices, ids, items)


class _Members:
    """The places in the job of a group's items, and their ids."""

    def __init__(self) -> None:
        self.indices, self.ids = array("q"), bytearray()

    def add(self, index: int, id: str) -> None:
        self.indices.append(index)
        self.ids += bytes.fromhex(id)

    def extend(self, others: "_Members") -> None:
        self.indices.extend(others.indices)
        self.ids += others.ids

    def id(self, place: int) -> str:
        return self.ids[place * ID_BYTES : (place + 1) * ID_BYTES].hex()


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
    """Cuts the items into chunks; groups come as their first items do, and in a group items are sorted by rows.

    A call runs the rows of its longest table for all its pictures, so that neighbours should have equally many.

    fingerprint: what tells the model from others. batch: items a device takes at once. chunk_size: the most pictures of
    a chunk, made a multiple of batch. prompt_chunks: how many chunks of tokens an item's texts have.
    rows: how many evaluations of the model an item takes; items of equally many keep their order.
    loras: a hash of the content of each LoRA file (`job.lora_digests`), which goes into the ids of items that use it.
    """
    if batch < 1 or chunk_size < 1:
        raise ValueError(f"batch and chunk_size must be 1 or more, not {batch} and {chunk_size}")
    groups: dict[Group, dict[int, _Members]] = {}
    for index, item in enumerate(items):
        model = " ".join([fingerprint, *(loras[path] for path, _ in item.loras)]) if loras else fingerprint
        by_rows = groups.setdefault(Group.of(item, prompt_chunks(item)), {})
        by_rows.setdefault(rows(item), _Members()).add(index, item.id(model))
    merged = {group: _merged(by_rows) for group, by_rows in groups.items()}
    return Plan(items, batch, max(chunk_size // batch, 1) * batch, format, merged)


def _merged(by_rows: Mapping[int, _Members]) -> _Members:
    whole = _Members()
    for _, members in sorted(by_rows.items()):
        whole.extend(members)
    return whole


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


def estimate(plan: Plan, picture_format: str = "png", rate: float | None = None) -> Estimate:
    """plan: of items that `job.check` filled in. picture_format: png, webp or jpeg. rate: pictures a second."""
    groups = [(group, len(members.indices)) for group, members in zip(plan.groups, plan.members, strict=True)]
    pixels = sum(group.width * group.height * count for group, count in groups)
    return Estimate(
        items=len(plan.items),
        chunks=len(plan),
        units=sum(-(-count // plan.batch) for _, count in groups),
        compilations=len({group.shape for group, _ in groups}),
        bytes=math.ceil(pixels * BYTES_PER_PIXEL[picture_format]),
        seconds=None if rate is None else len(plan.items) / rate,
    )
