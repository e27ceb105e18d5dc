"""One run at a time on a target: a file that names the run at work, with the time of its last sign of life.

A lock saves work and nothing rests on it: chunks are written whole, and two runs of a job write the same bytes.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from sdjax.batch.output import write_whole
from sdjax.files import creating

BEAT_SECONDS = 5.0
DEAD_SECONDS = 60.0

_held: set[str] = set()  # tokens of this process: after a restart, another may have had the same host name and pid


class LockedError(OSError):
    """Another run holds the target."""


class Lock:
    """`with Lock(fs, path):` holds the file at `path`, made for it, and renews its heartbeat in a thread.

    A lock whose process is gone from this host, or whose heartbeat is older than DEAD_SECONDS by this host's clock, is
    taken over; `note` then names the run that it was of. Raises LockedError that names the holder of a live one.
    """

    def __init__(self, fs: AbstractFileSystem, path: str):
        self.fs, self.path = fs, path
        self.note: str | None = None
        self._token, self._started = secrets.token_hex(8), time.time()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="sdjax lock", daemon=True)

    def __enter__(self) -> "Lock":
        while not self._create():
            found = self._read()
            if found is None:
                continue  # just released
            holder = parsed(found)
            if is_alive(holder):
                raise LockedError(_refusal(self.path, holder))
            self.note = f"taken over from {named(holder)}, which is dead"
            self._remove()
        _held.add(self._token)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(BEAT_SECONDS)
        _held.discard(self._token)
        if self._is_own():
            self._remove()

    def _record(self) -> bytes:
        own = {"host": socket.gethostname(), "pid": os.getpid(), "token": self._token}
        return json.dumps(own | {"started": self._started, "heartbeat": time.time()}, allow_nan=False).encode()

    def _create(self) -> bool:
        """Makes a new file with this lock's record; False where there is one."""
        with suppress(FileExistsError):
            if isinstance(self.fs, LocalFileSystem):
                with creating(self.path) as temporary:  # exclusive, which fsspec's own creation is not
                    temporary.write_bytes(self._record())
            else:
                self.fs.pipe_file(self.path, self._record(), mode="create")
            return True
        return False

    def _read(self) -> bytes | None:
        with suppress(FileNotFoundError):
            return self.fs.cat_file(self.path)
        return None

    def _remove(self) -> None:
        with suppress(FileNotFoundError):
            self.fs.rm_file(self.path)

    def _is_own(self) -> bool:
        return parsed(self._read()).get("token") == self._token

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with suppress(Exception):  # a full disk, a lost connection: the next beat may go through
                if self._is_own():
                    write_whole(self.fs, self.path, self._record())


def parsed(found: bytes | None) -> dict[str, Any]:
    """The record in a lock's file; {}, which is a dead one's, for anything else."""
    try:
        record = json.loads(found or b"")
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def is_alive(holder: Mapping[str, Any]) -> bool:
    """Whether the run of a lock's record is at work, as far as this host can know."""
    if holder.get("token") in _held:
        return True
    if holder.get("host") == socket.gethostname() and not _is_other_process(holder["pid"]):
        return False
    return time.time() - holder.get("heartbeat", 0) < DEAD_SECONDS


def _is_other_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def named(holder: Mapping[str, Any]) -> str:
    """The run of a lock's record, in words."""
    if "started" not in holder:
        return "an unknown run"
    since = datetime.fromtimestamp(holder["started"]).astimezone().isoformat(" ", "seconds")
    return f"the run on {holder['host']}, pid {holder['pid']}, since {since}"


def _refusal(path: str, holder: Mapping[str, Any]) -> str:
    silent = max(0, time.time() - holder["heartbeat"])
    return (
        f"{path}: held by {named(holder)}; wait for it or stop it (it renewed this lock {silent:.0f} s ago; after "
        f"{DEAD_SECONDS:.0f} s without, it counts as dead)"
    )
