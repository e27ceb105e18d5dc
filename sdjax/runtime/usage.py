"""How the devices spend their time."""

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Dispatch:
    """When a call was begun and handed over to the devices, in seconds of the clock."""

    begun: float
    handed_over: float
    host: float
    """seconds of the host's processor between them"""
    compiles: bool
    """whether programs were compiled between them"""


class Usage:
    """The time of the devices from their first call on, compilation left out."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.idle = 0.0
        """of these, with nothing to do"""
        self._done = 0.0
        self._host = float("inf")

    @property
    def idle_share(self) -> float:
        return self.idle / self.seconds if self.seconds else 0.0

    def add(self, call: Dispatch) -> float:
        """The seconds that the devices took for a call, which they have just finished; calls come in order.

        They have something to do from when the first program of a call is there. That is taken to be the host's work of
        the quickest call after its beginning: a slow one may itself have waited for the devices.
        """
        done = time.perf_counter()
        if call.compiles:
            ready = call.handed_over
        else:
            self._host = min(self._host, call.host)
            ready = call.begun + self._host
        idle = 0.0 if call.compiles or not self._done else max(0.0, ready - self._done)
        taken = done - max(ready, self._done)
        self.idle += idle
        self.seconds += idle + taken
        self._done = done
        return taken
