"""A process beside a notebook, whose kernel it does not outlive."""

import atexit
import contextlib
import re
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from html import escape

from sdjax.notebooks.cell import Markup, Place

LINES = 200  # of what it says, that are kept
PATIENCE = 30  # seconds for it to end


class Child:
    """A process that has said where it is to be found: `address`, what the pattern first matches of its output.

    Until then its last line is shown in the cell. `log` has its last lines. Raises FileNotFoundError where there is no
    such command, RuntimeError with the log where it ends before. A cell that is stopped does not stop it.
    """

    def __init__(self, command: Sequence[str], pattern: str):
        self.log: deque[str] = deque(maxlen=LINES)
        with _uninterrupted():
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
            )
        atexit.register(self.stop)
        try:
            self.address = self._found(pattern)
        except BaseException:
            self.stop()
            self._process.stdout.close()
            raise
        threading.Thread(target=self._listen, daemon=True).start()

    def stop(self) -> None:
        """Asks it to end, and waits; PATIENCE over, it is ended."""
        atexit.unregister(self.stop)
        self._process.terminate()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _found(self, pattern: str) -> str:
        place = Place()
        for line in self._lines():
            if match := re.search(pattern, line):
                place.show(Markup("", ""))
                return match[0]
            self.log.append(line)
            place.show(Markup(f"<code>{escape(line)}</code>", line))
        raise RuntimeError("\n".join(self.log))

    def _listen(self) -> None:
        with self._process.stdout:
            self.log.extend(self._lines())

    def _lines(self) -> Iterator[str]:
        return (line.rstrip() for line in self._process.stdout)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """What is started within never has SIGINT, which notebooks send to the kernel's children too."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
