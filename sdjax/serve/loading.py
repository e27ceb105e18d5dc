"""Files that are loaded while a server runs: whether memory has room for them, and what is said of wrong ones."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import jax

from sdjax.runtime import host
from sdjax.runtime.lowering import is_out_of_memory
from sdjax.serve.catalog import WEIGHTS

SPARE = 2.0  # bytes of free memory that a model needs for each byte of its files


class CannotLoad(ValueError):
    """A model's files are no model that can be used."""


def fits(source: str | None) -> bool:
    """Whether the memory of the devices, of the host where they have none of their own, has room for its weights."""
    return SPARE * _bytes(source) < _free()


def _bytes(source: str | None) -> int:
    """Of the weight files; 0 where they are not here."""
    path = Path(source or "")
    files = path.rglob("*") if source and path.is_dir() else [path] if source and path.is_file() else []
    return sum(file.stat().st_size for file in files if file.suffix in WEIGHTS)


def _free() -> float:
    known = [device.memory_stats() for device in jax.local_devices()]
    if all(known):
        return min(stats.get("bytes_limit", math.inf) - stats.get("bytes_in_use", 0) for stats in known)
    return host.available()


@contextlib.contextmanager
def loading(name: str, source: str | None) -> Iterator[None]:
    """Raises CannotLoad that begins with the name, without folders of this machine, for what is wrong with files."""
    try:
        yield
    except (ValueError, OSError) as error:
        if is_out_of_memory(error):
            raise
        raise CannotLoad(f"{name}: cannot be loaded: {_without_path(error, source, name)}") from error


@contextlib.contextmanager
def fitting(name: str) -> Iterator[None]:
    """Raises CannotLoad that begins with the name where the memory has no room."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise CannotLoad(f"{name}: does not fit into the memory") from error


def _without_path(error: Exception, source: str | None, name: str) -> str:
    """The message, without the folders of this machine."""
    said = getattr(error, "strerror", None) or str(error)
    return said.replace(source, name) if source else said
