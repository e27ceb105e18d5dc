"""One run at a time on a target: a file that says whose it is and that the run is alive."""

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
TAKEOVER_SECONDS = 0.1  # between looks at somebody else's takeover

_held: set[str] = set()  # tokens of this process: after a restart, another may have had the same host name and pid


class LockedError(OSError):
    """Another run holds the target."""


class Lock:
    """`with Lock(fs, path):` holds the file at `path`, made for it, and renews its heartbeat in a thread.

    A lock whose process is gone from this host, or whose heartbeat is older than DEAD_SECONDS by this host's clock, is
    taken over; `note` then says whose it was. LockedError says who holds a live one.
    Of local runs that start at once exactly one gets the lock. On an object store without exclusive creation two may,
    if they start in the same moment; their next heartbeats find out, and all but one are `lost`.
    """

    def __init__(self, fs: AbstractFileSystem, path: str):
        self.fs, self.path = fs, path
        self.note: str | None = None
        self.lost = False
        """whether another run has taken this lock, which makes going on wrong"""
        self._token, self._started = secrets.token_hex(8), time.time()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="sdjax lock", daemon=True)

    def __enter__(self) -> "Lock":
        while not self._create(self.path):
            found = self._read(self.path)
            if found is None:
                continue  # just released
            holder = parsed(found)
            if is_alive(holder):
                raise LockedError(_refusal(self.path, holder))
            if self._replace(found):
                self.note = f"taken over from {named(holder)}, which is dead"
                break
        _held.add(self._token)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(BEAT_SECONDS)
        _held.discard(self._token)
        if parsed(self._read(self.path)).get("token") == self._token:
            self._remove(self.path)

    def _record(self) -> bytes:
        now = {"started": self._started, "heartbeat": time.time()}
        own = {"host": socket.gethostname(), "pid": os.getpid(), "token": self._token}
        return json.dumps(own | now, allow_nan=False).encode()

    def _create(self, path: str) -> bool:
        """Makes a new file with this lock's record; False where there is one."""
        try:
            if isinstance(self.fs, LocalFileSystem):
                with creating(path) as temporary:  # which fsspec's own creation is not
                    temporary.write_bytes(self._record())
            else:
                self.fs.pipe_file(path, self._record(), mode="create")
        except FileExistsError:
            return False
        return True

    def _read(self, path: str) -> bytes | None:
        """What the file says; None where there is none."""
        with suppress(FileNotFoundError):
            return self.fs.cat_file(path)
        return None

    def _replace(self, dead: bytes) -> bool:
        """Puts this lock in the place of one that says `dead`; False where that changed or another run is at it."""
        marker = f"{self.path}.takeover"
        if not self._create(marker):
            if is_alive(parsed(self._read(marker))):
                time.sleep(TAKEOVER_SECONDS)
            else:
                self._remove(marker)
            return False
        try:
            if self._read(self.path) != dead:
                return False
            write_whole(self.fs, self.path, self._record())
            return True
        finally:
            self._remove(marker)

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self.fs.rm_file(path)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with suppress(Exception):  # a full disk, a lost connection: the next beat may go through
                found = self._read(self.path)
                if found is not None and parsed(found).get("token") != self._token:
                    self.lost = True
                    return
                write_whole(self.fs, self.path, self._record())


def parsed(found: bytes | None) -> dict[str, Any]:
    """The record in a lock's file; {}, which is a dead one's, for anything else."""
    try:
        record = json.loads(found or b"")
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def is_alive(holder: Mapping[str, Any]) -> bool:
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
