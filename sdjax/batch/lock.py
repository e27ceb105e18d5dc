"""One run at a time on a target: a file that names the run at work, with the time of its last sign of life.

A lock saves work and nothing rests on it: chunks are written whole, and two runs of a job write the same bytes.
"""

import json
import os
import secrets
import socket
import stat
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from sdjax.batch.output import write_whole
from sdjax.fields import Within, checked, kinds_of
from sdjax.files import creating

BEAT_SECONDS = 5.0
DEAD_SECONDS = 60.0
LARGEST = 1 << 16  # bytes

Text = Annotated[str, Within(0, 300)]
Seconds = Annotated[float, Within(0, 1e11)]

_held: set[str] = set()  # tokens of this process: after a restart, another may have had the same host name and pid


@dataclass(frozen=True)
class Holder:
    """The run that holds a lock, as the lock's file has it."""

    host: Text
    pid: Annotated[int, Within(1, 2**31 - 1)]
    token: Text
    started: Seconds
    heartbeat: Seconds
    born: Text | None = None
    """which of all processes of the host that ever had this pid: see `_birth`"""

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.started).astimezone().isoformat(" ", "seconds")
        return f"the run on {self.host}, pid {self.pid}, since {since}"


class LockedError(OSError):
    """Another run holds the target."""


class Lock:
    """`with Lock(fs, path):` holds the file at `path`, made for it, and renews its heartbeat in a thread.

    A lock whose process is gone from this host is taken over; so is one whose heartbeat is further than DEAD_SECONDS
    from this host's clock, unless its process is seen to live here. `note` then names the run that it was of. Raises
    LockedError that names the holder of a live one, OSError for what is no regular file.
    """

    def __init__(self, fs: AbstractFileSystem, path: str):
        self.fs, self.path = fs, path
        self.note: str | None = None
        now, token = time.time(), secrets.token_hex(8)
        self._own = Holder(socket.gethostname(), os.getpid(), token, now, now, _birth(os.getpid()))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="sdjax lock", daemon=True)

    def __enter__(self) -> "Lock":
        while not self._create():
            found = _read(self.fs, self.path)
            if found is None:
                continue  # just released
            holder = parsed(found)
            if is_alive(holder):
                raise LockedError(_refusal(self.path, holder))
            self.note = f"taken over from {holder or 'an unknown run'}, which is dead"
            self._remove()
        _held.add(self._own.token)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(BEAT_SECONDS)
        _held.discard(self._own.token)
        with suppress(OSError):  # whoever finds it finds that its process is gone
            if self._is_own():
                self._remove()

    def _record(self) -> bytes:
        return json.dumps(asdict(replace(self._own, heartbeat=time.time())), allow_nan=False).encode()

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

    def _remove(self) -> None:
        with suppress(FileNotFoundError):
            self.fs.rm_file(self.path)

    def _is_own(self) -> bool:
        holder = holder_of(self.fs, self.path)
        return holder is not None and holder.token == self._own.token

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with suppress(Exception):  # a full disk, a lost connection: the next beat may go through
                if self._is_own():
                    write_whole(self.fs, self.path, self._record())


def holder_of(fs: AbstractFileSystem, path: str) -> Holder | None:
    """The run that the lock at this path names; None where there is no lock, or a broken one, which is a dead run's."""
    return parsed(_read(fs, path))


def parsed(found: bytes | None) -> Holder | None:
    """The run that the content of a lock names; None for anything else."""
    try:
        record = json.loads(found or b"")
        return Holder(**{name: checked(name, record.get(name), kind) for name, kind in kinds_of(Holder).items()})
    except (ValueError, AttributeError, RecursionError):
        return None


def is_alive(holder: Holder | None) -> bool:
    """Whether the run is at work, as far as this host can know."""
    if holder is None:
        return False
    if holder.token in _held:
        return True
    if holder.host == socket.gethostname():
        born = _birth(holder.pid)
        if born is not None and holder.born is not None and _pids(born) == _pids(holder.born):
            return born == holder.born  # however long it was too busy to renew the lock
        if not _is_other_process(holder.pid):
            return False
    return abs(time.time() - holder.heartbeat) < DEAD_SECONDS


def _birth(pid: int) -> str | None:
    """What no other process has had: the set of pids that its pid is of, and when it began, in ticks since the start.

    None where there is no such process, and on systems without /proc.
    """
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if state in (b"Z", b"X") else f"{os.readlink('/proc/self/ns/pid')} {int(numbers[18])}"
    except OSError:
        return None


def _pids(born: str) -> str:
    return born.partition(" ")[0]


def _is_other_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def _read(fs: AbstractFileSystem, path: str) -> bytes | None:
    """The content of a lock; None where there is none."""
    with suppress(FileNotFoundError):
        if not isinstance(fs, LocalFileSystem):
            return fs.cat_file(path)
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise OSError(f"{path}: no regular file, which a lock is; remove it")
        with open(path, "rb") as file:
            return file.read(LARGEST)
    return None


def _refusal(path: str, holder: Holder) -> str:
    silent = max(0, time.time() - holder.heartbeat)
    return (
        f"{path}: held by {holder}; wait for it or stop it (it renewed this lock {silent:.0f} s ago; on another host "
        f"it counts as dead after {DEAD_SECONDS:.0f} s without)"
    )
