"""Files that appear whole or not at all, on the disk before they have their name, whatever ends the process."""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where os.rename refuses a name that is taken
    fcntl = None

TEMPORARY = re.compile(r"\.sdjax-[0-9a-f]{16}\.tmp")
"""Names of what is being written, beside where it goes; those that a killed process left can be removed."""

_unfinished: set[Path] = set()
"""What this process is writing"""


def temporary_name() -> str:
    """A new name that TEMPORARY matches."""
    return f".sdjax-{secrets.token_hex(8)}.tmp"


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary path beside `path`; the file that the block makes there then makes or replaces `path`.

    The block may write the file in any way. Where it raises, or is killed, `path` is as it was.
    """
    with _settling(Path(path), _touch, os.replace) as temporary:
        yield temporary


@contextmanager
def creating(path: str | os.PathLike) -> Iterator[Path]:
    """As `replacing`, but raises FileExistsError where there is a file: before the block, or after, if one appeared."""
    path = Path(path)
    _refuse_existing(path)
    with _settling(path, _touch, _move_to_new) as temporary:
        yield temporary


@contextmanager
def creating_folder(path: str | os.PathLike) -> Iterator[Path]:
    """As `creating`, of a folder that the block fills with files, each by `replacing` or `creating`."""
    path = Path(path)
    _refuse_existing(path)
    with _settling(path, os.mkdir, _rename_to_new) as temporary:
        yield temporary


@contextmanager
def unfinished(temporary: Path) -> Iterator[None]:
    """Removes a file or folder, if it is there, after the block, or before a signal ends the process meanwhile."""
    _unfinished.add(temporary)
    try:
        yield
    finally:
        _remove(temporary)
        _unfinished.discard(temporary)


def discard_unfinished() -> None:
    """Removes what this process is writing, before it ends in the middle of that."""
    for temporary in [*_unfinished]:
        _remove(temporary)


def sweep(folder: Path) -> None:
    """Removes what killed processes left in a folder; what is being written is locked, where the system has locks."""
    for left in [path for path in folder.iterdir() if TEMPORARY.fullmatch(path.name)] if fcntl else []:
        with suppress(OSError), _open(left) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(left)


@contextmanager
def _settling(path: Path, make: Callable[[Path], None], move: Callable[[Path, Path], None]) -> Iterator[Path]:
    temporary = path.with_name(temporary_name())
    with unfinished(temporary):
        make(temporary)
        with _locked(temporary):
            yield temporary
            if temporary.is_file():
                with open(temporary, "r+b") as file:  # Windows flushes no file that is open for reading alone
                    os.fsync(file.fileno())
            move(temporary, path)


def _touch(path: Path) -> None:
    path.touch(exist_ok=False)


def _remove(temporary: Path) -> None:
    with suppress(OSError):
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _move_to_new(source: Path, path: Path) -> None:
    try:
        os.link(source, path)
    except FileExistsError:
        raise
    except (OSError, NotImplementedError, AttributeError):  # a file system, or a system, without hard links
        _rename_to_new(source, path)


def _rename_to_new(source: Path, path: Path) -> None:
    with _locked(path.parent):
        _refuse_existing(path)
        os.rename(source, path)


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps other processes and threads from locking the same file or folder, where the system has such locks."""
    if fcntl is None:
        yield
        return
    with _open(path) as handle:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def _open(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)
