"""One side of `bench.py`, a process of its own: `bench_side.py SIDE FOLDER DTYPE DEVICE`. It waits at its input.

Every reply is a line of JSON. The first one, unasked, comes when the weights are loaded. Then a line is
`{"prepare": STAGE, "out": FILE, "layouts": ...}`, which compiles, warms up and writes the result to FILE, or
`{"measure": STAGE}`, which computes the prepared stage once. What libraries print goes to stderr. Needs NumPy and what
the side needs.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
from bench_stages import STAGES, Stage, inputs
from processes import reset_peak, resident_bytes

MODULES = {
    "sdjax": "bench_sdjax",
    "pytorch": "bench_torch",
    "torch.compile": "bench_torch",
    "flax-0.35": "bench_flax035",
}
WARM_UPS = {"cpu": 0, "gpu": 1, "tpu": 1}  # calls after the first; CUDA graphs are recorded in the second

Layouts = dict[str, dict[str, float]]
"""Seconds of a call, by network and memory layout"""


class Side(Protocol):
    """An implementation, its weights loaded."""

    versions: dict[str, str]
    device_name: str | None

    def prepare(self, stage: Stage, arrays: dict[str, np.ndarray], layouts: Layouts) -> Callable[[], Any]:
        """A function that computes the stage and returns when the result is there. layouts: known from another side."""

    def layouts(self, stage: Stage) -> Layouts:
        """Of the networks of a prepared stage, where there is a choice."""

    def array(self, result: Any) -> np.ndarray:
        """A result as float32, NHWC."""

    def flops(self, stage: Stage) -> int | None:
        """Floating-point operations of the products of a prepared stage, where this side counts them."""

    def device_peak(self, *, reset: bool) -> int | None:
        """The most bytes that were in use on the device, begun again if reset; None: it is the host's memory."""


class Memory:
    """The most memory in use between `start` and `peak`: of an accelerator, else resident in this process."""

    def __init__(self, side: Side):
        self._side = side

    def start(self) -> None:
        gc.collect()
        reset_peak()
        self._side.device_peak(reset=True)

    def peak(self) -> int:
        peak = self._side.device_peak(reset=False)
        return resident_bytes("VmHWM") if peak is None else peak


def serve(side: Side, folder: Path, device: str, replies: TextIO) -> None:
    """Answers until the input ends."""
    memory, run = Memory(side), None
    idle_from = time.process_time()
    for line in sys.stdin:
        reply, request = {"idle_cpu": time.process_time() - idle_from}, json.loads(line)
        memory.start()
        if "prepare" in request:
            stage = STAGES[device][request["prepare"]]
            run = side.prepare(stage, inputs(folder, stage), request["layouts"])
            reply |= warm_up(side, run, WARM_UPS[device], request["out"])
            reply |= {"layouts": side.layouts(stage), "flops": side.flops(stage)}
        else:
            reply["before"] = resident_bytes("VmRSS")
            reply["seconds"] = seconds(run)[0]
        reply["peak"] = memory.peak()
        print(json.dumps(reply, allow_nan=False), file=replies, flush=True)
        idle_from = time.process_time()


def warm_up(side: Side, run: Callable[[], Any], calls: int, out: str) -> dict[str, float]:
    """The first call, which compiles, and as many more as are asked for; the result is written to a file."""
    first, result = seconds(run)
    np.save(out, side.array(result))
    del result
    for _ in range(calls):
        run()
    return {"first": first}


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """How long a call takes, and its result."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def main() -> None:
    name, folder, dtype, device = sys.argv[1:]
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)
        start = time.perf_counter()
        side = import_module(MODULES[name]).load(name, Path(folder), dtype, device)
        loaded = {"load": time.perf_counter() - start, "versions": side.versions, "device_name": side.device_name}
        print(json.dumps(loaded, allow_nan=False), file=replies, flush=True)
        serve(side, Path(folder), device, replies)


if __name__ == "__main__":
    main()
