"""SIGTERM and Ctrl-C during a run: a checkpoint after the step that is being computed, then the end."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from sdjax import files
from sdjax.runtime.signals import taken_by

NOTICE = b"stopping after this step; the same signal again ends at once\n"


class Stopped(KeyboardInterrupt):
    """A run was stopped by the signal `signum`, after a step of which there is a checkpoint."""

    def __init__(self, signum: int, step: int, steps: int, folder: object):
        name = signal.Signals(signum).name
        super().__init__(
            f"stopped by {name} after step {step} of {steps}: {folder} has its checkpoint; the same command goes on"
        )
        self.signum = signum


class Stop:
    """`signum` is that of the first signal, None before; a second one ends the process at once."""

    signum: int | None = None

    def request(self, signum: int, frame: FrameType | None = None) -> None:
        """What the signals call."""
        if self.signum is not None:
            files.discard_unfinished()
            os._exit(128 + signum)
        self.signum = signum
        os.write(2, NOTICE)


@contextmanager
def requested() -> Iterator[Stop]:
    """A Stop that the signals make."""
    stop = Stop()
    with taken_by(stop.request):
        yield stop
