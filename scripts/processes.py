"""Memory of this process, and functions run in a process of their own. Standard library alone; Linux."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


def resident_bytes(field: str) -> int:
    """Memory of this process that is in RAM: now (VmRSS) or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def reset_peak() -> None:
    """Lets VmHWM begin again from VmRSS."""
    Path("/proc/self/clear_refs").write_text("5")


def in_a_process(function: Callable, *args: Any) -> Any:
    """function(*args) computed in a fresh process, all of whose memory is given back."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()
