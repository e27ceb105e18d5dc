"""The pictures that were made: in a folder, or the last ones in memory."""

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image

from sdjax.pictures import metadata
from sdjax.pictures.metadata import slug
from sdjax.serve.settings import carried, fields

HELD_BYTES = 2**28
REMEMBERED = 4096  # files whose settings are known
SUFFIX = ".png"
MOST_PIXELS = 2**26


class Kept(NamedTuple):
    """A picture of the gallery."""

    name: str
    settings: dict[str, Any]
    """as fields of a request"""
    time: float
    """when it was made, in seconds since 1970"""


class Gallery(Protocol):
    """Where pictures are kept by name."""

    def add(self, image: Image.Image, settings: Mapping[str, Any], time: float) -> str:
        """Keeps a picture with what its file carries, and returns its name."""

    def file(self, name: str) -> bytes | None:
        """The PNG of a name; None: there is none."""

    def page(self, start: int, count: int) -> tuple[list[Kept], int]:
        """So many pictures, newest first, and how many there are in all."""


class InMemory:
    """The last pictures, HELD_BYTES of them."""

    def __init__(self, most: int = HELD_BYTES):
        self._most, self._held, self._number = most, 0, 0
        self._files: OrderedDict[str, tuple[bytes, Kept]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, image: Image.Image, settings: Mapping[str, Any], time: float) -> str:
        data = metadata.encode(image, settings, "png")
        with self._lock:
            self._number += 1
            name = f"{slug(settings['prompt'])}-{settings['seed']}-{self._number}{SUFFIX}"
            self._files[name] = data, Kept(name, fields(settings), time)
            self._held += len(data)
            while self._held > self._most and len(self._files) > 1:
                _, (oldest, _) = self._files.popitem(last=False)
                self._held -= len(oldest)
        return name

    def file(self, name: str) -> bytes | None:
        found = self._files.get(name)
        return found and found[0]

    def page(self, start: int, count: int) -> tuple[list[Kept], int]:
        with self._lock:
            every = [kept for _, kept in reversed(self._files.values())]
        return every[start : start + count], len(every)


class InFolder:
    """The PNG files of a folder."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._known: OrderedDict[tuple[str, float], dict[str, Any]] = OrderedDict()

    def add(self, image: Image.Image, settings: Mapping[str, Any], time: float) -> str:
        stem = f"{slug(settings['prompt'])}-{settings['seed']}"
        return metadata.save_new(self._folder, stem, image, settings).name

    def file(self, name: str) -> bytes | None:
        path = self._path(name)
        try:
            return None if path is None else path.read_bytes()
        except OSError:
            return None

    def page(self, start: int, count: int) -> tuple[list[Kept], int]:
        found = sorted(self._files(), reverse=True)
        return [Kept(name, self._settings(name, time), time) for time, name in found[start : start + count]], len(found)

    def _files(self) -> list[tuple[float, str]]:
        """(when it was written, name) of each."""
        found = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # it may be gone by now
                    if _is_plain(entry.name) and entry.is_file(follow_symlinks=False):
                        found.append((entry.stat().st_mtime, entry.name))
        return found

    def _path(self, name: str) -> Path | None:
        """Of a file in the folder itself; None for what is elsewhere, hidden or no PNG."""
        path = self._folder / name
        return path if _is_plain(name) and path.is_file() and not path.is_symlink() else None

    def _settings(self, name: str, time: float) -> dict[str, Any]:
        if (name, time) not in self._known:
            try:
                found = carried(name, self.file(name) or b"", MOST_PIXELS)
            except ValueError:
                found = {}
            self._known[name, time] = found
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return self._known[name, time]


def _is_plain(name: str) -> bool:
    """Whether it is that of a PNG, and of no other folder."""
    return Path(name).name == name and not name.startswith(".") and name.lower().endswith(SUFFIX) and "\0" not in name
