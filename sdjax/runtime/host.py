"""How much memory the host has for this process."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None

KIB = 1024
GROUPS = Path("/sys/fs/cgroup")


def total() -> float:
    """Bytes that the process could have if it were alone: of RAM and swap, of its control groups, of `ulimit -v`."""
    return min(_ram_and_swap(), *(limit for limit, _ in _groups()), _ulimit())


def available() -> float:
    """Bytes that it can still have."""
    known = _meminfo()
    free = known["MemAvailable"] if "MemAvailable" in known else _physical()
    return min([free, *(limit - used for limit, used in _groups())])


def _ram_and_swap() -> float:
    known = _meminfo()
    return known["MemTotal"] + known["SwapTotal"] if known.keys() >= {"MemTotal", "SwapTotal"} else _physical()


def _physical() -> float:
    """Infinite where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return math.inf


def _ulimit() -> float:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0] if resource and hasattr(resource, "RLIMIT_AS") else -1
    return limit if limit > 0 else math.inf


def _meminfo() -> dict[str, int]:
    """Bytes by name, of Linux."""
    parts = (line.split() for line in _lines("/proc/meminfo"))
    return {name.rstrip(":"): int(size) * KIB for name, size, *_ in parts}


def _groups() -> Iterator[tuple[int, int]]:
    """(limit, used) of each control group that the process is in and that has a limit, of versions 1 and 2."""
    for line in _lines("/proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, files = GROUPS, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, files = GROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        own = root / path.lstrip("/")
        for folder in {root, own, *own.parents} - {*root.parents}:
            found = [int(line) for name in files for line in _lines(folder / name) if line.isdigit()]
            if len(found) == len(files):
                yield found[0], found[1]


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
