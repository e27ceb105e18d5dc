"""Functions called in another process, each call with its time and memory. Standard library alone; Linux.

As a program this is the other process: requests are lines of JSON at its input, replies at its output. What libraries
print goes to stderr.
"""

import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Self


@dataclass(frozen=True)
class Reply:
    """What a call returned, its seconds, and the process's memory in RAM: before it and at its peak, in bytes."""

    value: Any
    seconds: float
    before: int
    peak: int


class Worker:
    """A process of this or another Python that makes one call after the other and sleeps between them.

    environment: variables beside those of this process.
    """

    def __init__(self, python: str = sys.executable, **environment: str):
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed at the end
        self._process = subprocess.Popen(
            [python, __file__],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._idle_cpu, self._idle_seconds, self._idle_from = 0.0, 0.0, time.perf_counter()

    @property
    def is_alive(self) -> bool:
        """False once a call has ended it."""
        return self._process.poll() is None

    @property
    def idle_cores(self) -> float:
        """The processor time that it used between calls, over the seconds between calls."""
        return self._idle_cpu / self._idle_seconds

    def call(self, function: str, **arguments: Any) -> Reply:
        """`function` is "module:name"; its arguments and its value are what JSON can hold.

        Raises RuntimeError with the end of what the process printed if the call ended it.
        """
        self._idle_seconds += time.perf_counter() - self._idle_from
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps([function, arguments], allow_nan=False), file=self._process.stdin, flush=True)
        if not (line := self._process.stdout.readline()):
            status = self._process.wait()
            self._log.seek(0)
            raise RuntimeError(f"{function} ended with status {status}:\n{''.join(self._log.readlines()[-20:])}")
        idle_cpu, reply = json.loads(line)
        self._idle_cpu, self._idle_from = self._idle_cpu + idle_cpu, time.perf_counter()
        return Reply(**reply)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()


def resident_bytes(field: str) -> int:
    """Memory of this process that is in RAM: now (VmRSS) or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def _reply(function: str, arguments: dict[str, Any]) -> dict[str, Any]:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again from VmRSS
    before, start = resident_bytes("VmRSS"), time.perf_counter()
    value = resolve_name(function)(**arguments)
    seconds = time.perf_counter() - start
    return {"value": value, "seconds": seconds, "before": before, "peak": resident_bytes("VmHWM")}


def _serve() -> None:
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)
        idle_from = time.process_time()
        for line in sys.stdin:
            idle_cpu = time.process_time() - idle_from
            print(json.dumps([idle_cpu, _reply(*json.loads(line))], allow_nan=False), file=replies, flush=True)
            idle_from = time.process_time()


if __name__ == "__main__":
    _serve()
