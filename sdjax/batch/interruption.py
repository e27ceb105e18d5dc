"""What ends a run early: SIGTERM and Ctrl-C, a request to stop soon; and a target that keeps no pictures."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sdjax.runtime.signals import taken_by

GRACE_SECONDS = 7.0  # after that what is not finished is dropped


class Interrupted(KeyboardInterrupt):
    """A job was stopped by the signal `signum`; the same call goes on with it.

    is_busy: whether a thread still waits for a device or a compiler, which cannot be interrupted.
    """

    def __init__(self, signum: int, done: int, total: int, url: str, *, is_busy: bool):
        name = signal.Signals(signum).name
        super().__init__(
            f"stopped by {name}: {done:,} of {total:,} pictures are at {url}, whole; the same command makes the others"
        )
        self.signum, self.is_busy = signum, is_busy


class UnfinishedError(OSError):
    """Pictures that a run has begun are not at its target, since that could not be written, or lost some."""


class Stop:
    """A request to stop: `event` is set with it, and `is_over` when there is no more time."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.signum: int | None = None
        self._deadline = float("inf")

    def request(self, signum: int, _frame: object = None) -> None:
        """The first request leaves GRACE_SECONDS; a second one none."""
        self._deadline = time.monotonic() + (0 if self.event.is_set() else GRACE_SECONDS)
        self.signum = signum
        self.event.set()

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._deadline


@contextmanager
def requested() -> Iterator[Stop]:
    """A Stop that the signals make."""
    stop = Stop()
    with taken_by(stop.request):
        yield stop
