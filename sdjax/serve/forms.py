"""How many forms of pictures have compiled programs at once: sizes, guidance, chunks of prompts and what else selects
programs, which requests may choose."""

import threading
import time
from collections.abc import Callable, Hashable
from pathlib import Path

import jax

MAPPED = 40_000  # regions: where Linux allows no more, 65,530, XLA ends the process; on CPUs a form takes 1,100
LOOK = 10.0  # seconds between two looks at their number
MAPS = Path("/proc/self/maps")


class Forms:
    """Drops all programs where a form comes beyond `most`, or too many regions of memory are mapped for them: those
    that are needed come again, from the disk cache.

    drop: forgets all compiled programs, while others run. mapped: the number of regions.
    """

    def __init__(self, most: int, drop: Callable[[], None] = jax.clear_caches, mapped: Callable[[], int] | None = None):
        self._most, self._drop, self._mapped = most, drop, mapped or _mapped
        self._known: set[Hashable] = set()
        self._looked, self._lock = -LOOK, threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def use(self, form: Hashable) -> None:
        """Counts a form that is about to be computed."""
        with self._lock:
            if (form not in self._known and len(self._known) >= self._most) or self._are_many():
                self._drop()
                self._known.clear()
            self._known.add(form)

    def _are_many(self) -> bool:
        if time.monotonic() - self._looked < LOOK:
            return False
        self._looked = time.monotonic()
        return self._mapped() > MAPPED


def _mapped() -> int:
    """0 where the system does not say."""
    try:
        return MAPS.read_bytes().count(b"\n")
    except OSError:
        return 0
