"""Runs the application until a signal ends it: what runs is finished, what waits is cancelled."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from sdjax.serve.studio import Studio

GRACE = 20  # seconds for what runs
CONNECTIONS = 1000
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Server(uvicorn.Server):
    """Ends at a signal; at a second one at once."""

    def __init__(self, app: FastAPI, studio: Studio, on_ready: Callable[[], None]):
        options = {"log_level": "warning", "timeout_graceful_shutdown": GRACE, "limit_concurrency": CONNECTIONS}
        super().__init__(uvicorn.Config(app, lifespan="on", server_header=False, **options))
        self._studio, self._on_ready = studio, on_ready
        self.is_finished = True
        """whether all that ran was finished"""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Without raising them again at the end, as uvicorn's own does."""
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._studio.end()
        await super().shutdown(sockets)
        closing = asyncio.create_task(asyncio.to_thread(self._studio.close))
        done, _ = await asyncio.wait([closing], timeout=0 if self.force_exit else GRACE)
        self.is_finished = bool(done)


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises OSError where it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"{host}:{port}: cannot be listened to: {error.strerror}; choose another by --port") from None


def address(listening: socket.socket) -> str:
    """Of the page, for a browser on this machine."""
    host, port = listening.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"
