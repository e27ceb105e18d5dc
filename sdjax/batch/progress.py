"""What happens in a run, and what it comes to."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

RATE_SECONDS = 60.0  # over which the rate is taken


class Made(NamedTuple):
    """A picture is encoded, and waits for the others of its chunk."""

    index: int


class Written(NamedTuple):
    """A chunk is at the target, or those of its pictures that are finite."""

    chunk: str
    files: list[str]
    pictures: int
    nsfw: int
    failed: list[int]
    """the places in the job of the pictures that are not finite, and not there; with any, a further run makes the chunk
    again"""


class Kept(NamedTuple):
    """A chunk of an earlier run is as it was written."""

    chunk: str
    pictures: int


class Altered(NamedTuple):
    """A chunk of an earlier run is not as it was written, and is made again."""

    chunk: str


class Halved(NamedTuple):
    """A device ran out of memory; what is not made goes on in batches of this size."""

    batch: int


class Noted(NamedTuple):
    """Something to warn of."""

    text: str


class Planned(NamedTuple):
    """This run's share of the job, where several processes have one each."""

    pictures: int


class Manned(NamedTuple):
    """So many devices are at work, where they come and go."""

    by: int


Event = Made | Written | Kept | Altered | Halved | Noted | Planned | Manned
Emit = Callable[[Event], None]


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    total: int
    """pictures of the job, or of this process's share"""
    done: int
    """at the target"""
    failed: int
    """not finite, and not written"""
    waiting: int
    """made, and waiting for the others of their chunk"""
    per_second: float
    """pictures made, lately"""
    devices: int
    seconds_left: float | None
    """None: not known yet"""
    last: str | None
    """path or URL of the last file"""
    event: Event | None
    """what happened; None: only time passed"""

    @property
    def per_device(self) -> float:
        """Pictures a second of each device."""
        return self.per_second / max(1, self.devices)


class Tally:
    """Counts the events of a run."""

    def __init__(self, total: int, devices: int, shown: Callable[[str], str]):
        self.total, self.devices, self._shown = total, devices, shown
        self.made = self.waiting = self.written = self.kept = self.nsfw = 0
        self.failed: list[int] = []
        self.last: str | None = None
        self._times: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])

    @property
    def done(self) -> int:
        """Pictures at the target."""
        return self.kept + self.written

    def add(self, event: Event | None) -> Progress:
        """What it has come to after this event."""
        now = time.monotonic()
        match event:
            case Made():
                self.made, self.waiting = self.made + 1, self.waiting + 1
                if self.made == 1:  # until now programs were compiled
                    self._times.clear()
                self._times.append((now, self.made))
            case Written():
                self.written, self.waiting = self.written + event.pictures, max(0, self.waiting - event.pictures)
                self.nsfw += event.nsfw
                self.failed += event.failed
                if event.files:
                    self.last = self._shown(event.files[-1])
            case Kept():
                self.kept += event.pictures
            case Planned():
                self.total = event.pictures
            case Manned():
                self.devices = event.by
        while len(self._times) > 2 and now - self._times[1][0] > RATE_SECONDS:
            self._times.popleft()
        return self._progress(now, event)

    def _progress(self, now: float, event: Event | None) -> Progress:
        (then, before), failed = self._times[0], len(self.failed)
        rate = (self.made - before) / (now - then) if now > then else 0.0
        seconds = (self.total - self.done - failed - self.waiting) / rate if rate else None
        return Progress(self.total, self.done, failed, self.waiting, rate, self.devices, seconds, self.last, event)
