"""Pictures that an earlier run has read whole, so that the next one need not: by path, size and time of change."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from sdjax.files import replacing
from sdjax.pictures import picture
from sdjax.pictures.picture import Picture

Entry = tuple[int, int, str, int, int]
"""Bytes, time of change in ns, SHA-256, width, height"""


class Known:
    """What a file says of pictures. One whose content changes all the same is refused when its pixels are used."""

    def __init__(self, path: Path):
        self._path = path
        self._entries = _read(path)

    def picture(self, path: Path) -> Picture:
        """The picture of a file, read only where it is not known. Raises ValueError as `picture.read`."""
        state = _state(path)
        entry = self._entries.get(str(path))
        if entry is not None and state == (entry[0], entry[1]):
            return Picture(entry[2], (entry[3], entry[4]), str(path))
        found = picture.read("", path)
        if state is not None:
            self._entries[str(path)] = (*state, found.sha256, *found.size)
        return found

    def keep(self, paths: Iterable[Path]) -> None:
        """Writes what is known of these."""
        names = {str(path) for path in paths}
        entries = {name: entry for name, entry in self._entries.items() if name in names}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._path) as temporary:
            temporary.write_text(json.dumps(entries, allow_nan=False), "utf-8")


def _read(path: Path) -> dict[str, Entry]:
    """Nothing, for a file that is not there or not as `keep` writes it."""
    try:
        content = json.loads(path.read_text("utf-8"))
        return {name: (int(a), int(b), str(c), int(d), int(e)) for name, (a, b, c, d, e) in _items(content)}
    except (OSError, ValueError, TypeError):
        return {}


def _items(content: object) -> Iterable[tuple[str, list]]:
    if not isinstance(content, Mapping):
        raise TypeError("not an object")
    return content.items()


def _state(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
