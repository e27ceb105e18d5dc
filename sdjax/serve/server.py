"""Runs the application until a signal ends it: what runs is finished, what waits is cancelled."""

import asyncio
import contextlib
import socket
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

import uvicorn
from fastapi import FastAPI

from sdjax.runtime.signals import taken_by
from sdjax.serve.studio import Studio

GRACE = 20  # seconds for what runs
CONNECTIONS = 1000


class Server(uvicorn.Server):
    """Ends at a signal, within GRACE; at a second one at once.

    leave: ends the process while threads wait for a compiler, whether (True) or not all that was asked for is done.
    """

    def __init__(self, app: FastAPI, studio: Studio, on_ready: Callable[[], None], leave: Callable[[bool], NoReturn]):
        options = {"log_level": "warning", "limit_concurrency": CONNECTIONS}
        super().__init__(uvicorn.Config(app, lifespan="on", server_header=False, **options))
        self._studio, self._on_ready, self._leave = studio, on_ready, leave

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Without raising them again at the end, as uvicorn's own does."""
        with taken_by(self.handle_exit):
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self._leave(False)
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._studio.end()
        if not self._studio.is_idle:
            print("what is under way is finished; a second signal does not wait", file=sys.stderr)
        try:
            async with asyncio.timeout(GRACE):
                await super().shutdown(sockets)
                if self._studio.is_idle and not self._studio.is_warm:  # nobody waits for what is compiled
                    self._leave(True)
                await asyncio.to_thread(self._studio.close)
        except TimeoutError:
            self._leave(False)


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises OSError where it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        why = error.strerror.partition(" (while")[0]
        raise OSError(f"{host}:{port}: cannot be listened to: {why}; choose another by --port") from None


def address(listening: socket.socket) -> str:
    """Of the page, for a browser on this machine."""
    host, port = listening.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"
