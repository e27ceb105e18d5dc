"""How much of what was sent is in memory, of all requests: pixels, counted before they are decoded, or bytes."""

import threading


class Busy(RuntimeError):
    """More was sent than is held at once."""


class Held:
    """The pixels, or bytes, that all requests hold, `most` at most. said: why no more are taken."""

    def __init__(self, most: int, said: str = "too many pictures that were sent are waiting"):
        self._most, self._said, self.count, self._lock = most, said, 0, threading.Lock()

    def take(self, count: int) -> None:
        """Counts them. Raises Busy where they are too many."""
        with self._lock:
            if self.count + count > self._most:
                raise Busy(self._said)
            self.count += count

    def give(self, count: int) -> None:
        """Counts them no longer."""
        with self._lock:
            self.count -= count


class Share:
    """What one request holds of it, `most` pixels at most, until it is closed."""

    def __init__(self, held: Held, most: int):
        self._held, self._most, self._pixels, self._lock = held, most, 0, threading.Lock()
        self.is_kept = False
        """whether an order has it, and closes it when it has ended"""

    def take(self, name: str, pixels: int) -> None:
        """Raises ValueError that begins with the name where the request has too many, Busy where all have."""
        if self._pixels + pixels > self._most:
            raise ValueError(f"{name}: more than {self._most:,} pixels are sent with one request")
        self._held.take(pixels)
        self._pixels += pixels

    def close(self) -> None:
        """Gives all of it back."""
        with self._lock:
            pixels, self._pixels = self._pixels, 0
        self._held.give(pixels)
