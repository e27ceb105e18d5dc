"""SIGTERM and Ctrl-C as requests to stop."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def taken_by(request: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within it the signals call `request`; outside of the main thread, where Python takes none, nothing does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, request) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler or signal.SIG_DFL)
