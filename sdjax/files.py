"""Files that appear whole or not at all, on the disk before they have their name, whatever ends the process."""

import errno
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where os.rename refuses a name that is taken
    fcntl = None

TEMPORARY = re.compile(r"\.sdjax-[0-9a-f]{16}\.tmp")
"""Names of what is being written, beside where it goes; those that a killed process left can be removed."""


def temporary_name() -> str:
    """A new name that TEMPORARY matches."""
    return f".sdjax-{secrets.token_hex(8)}.tmp"


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary path beside `path`; the file that the block makes there then makes or replaces `path`.

    The block may write the file in any way. Where it raises, or is killed, `path` is as it was.
    """
    with _settling(Path(path), os.replace) as temporary:
        yield temporary


@contextmanager
def creating(path: str | os.PathLike) -> Iterator[Path]:
    """As `replacing`, but raises FileExistsError where there is a file: before the block, or after, if one appeared."""
    path = Path(path)
    _refuse_existing(path)
    with _settling(path, _move_to_new) as temporary:
        yield temporary


@contextmanager
def _settling(path: Path, move: Callable[[Path, Path], None]) -> Iterator[Path]:
    temporary = path.with_name(temporary_name())
    try:
        yield temporary
        with open(temporary, "r+b") as file:  # Windows flushes no file that is open for reading alone
            os.fsync(file.fileno())
        move(temporary, path)
    finally:
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
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other processes and threads from renaming to a new name in the folder, where the system has such locks."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
