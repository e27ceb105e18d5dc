"""Files of a folder by name: what requests may choose from. Nothing of them is loaded."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from sdjax.fields import brief
from sdjax.request.elsewhere import hint

WEIGHTS = (".safetensors", ".ckpt", ".pt", ".bin")
INDEX = "model_index.json"
FRESH = 2.0  # seconds for which a list is good
DEPTH = 4  # folders within folders


class Unknown(ValueError):
    """There is nothing of this name."""


class Catalog:
    """What a folder has, by name: the path within it, without the suffix unless that tells it from another.

    kind: what messages call it. find: the files of the folder; by default the weight files.
    """

    def __init__(self, kind: str, folder: Path | None, find: Callable[[Path], Iterator[Path]] | None = None):
        self.kind, self._folder, self._find = kind, folder, find or weight_files
        self._paths: Mapping[str, Path] = {}
        self._read = -FRESH

    @property
    def paths(self) -> Mapping[str, Path]:
        """By name, sorted; read again where the list is older than FRESH."""
        if self._folder is not None and time.monotonic() - self._read > FRESH:
            self._paths, self._read = _named(self._folder, self._find(self._folder)), time.monotonic()
        return self._paths

    def name(self, wanted: object) -> str:
        """The name of what is called so: by its name, its path within the folder or, if but one has it, its stem.

        Raises Unknown.
        """
        paths = self.paths
        if isinstance(wanted, str):
            if wanted in paths:
                return wanted
            stems = [name for name, path in paths.items() if wanted in (path.stem, self.file_of(path))]
            if len(stems) == 1:
                return stems[0]
        raise Unknown(f"there is no {self.kind} {brief(wanted)}{hint(wanted, paths) if paths else '; there is none'}")

    def path(self, name: str) -> Path:
        """Of a name. Raises Unknown where it is there no longer."""
        found = self.paths.get(name)
        if found is None:
            raise Unknown(f"there is no {self.kind} {brief(name)}")
        return found

    def file_of(self, path: str | Path) -> str:
        """The path within the folder of a path that is in it."""
        return Path(path).relative_to(self._folder).as_posix()


def weight_files(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """Weight files, also those in folders."""
    for path in _entries(folder):
        if path.is_dir():
            yield from weight_files(path, depth - 1) if depth else ()
        elif path.suffix.lower() in WEIGHTS:
            yield path


def models(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """Models: weight files, and folders as diffusers has them."""
    for path in _entries(folder):
        if (path / INDEX).is_file():
            yield path
        elif path.is_dir():
            yield from models(path, depth - 1) if depth else ()
        elif path.suffix.lower() in WEIGHTS:
            yield path


def _entries(folder: Path) -> list[Path]:
    """Those that are not hidden; none where the folder cannot be read."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return []


def _named(folder: Path, found: Iterator[Path]) -> dict[str, Path]:
    paths = {path.relative_to(folder): path for path in found}
    short = [_short(path, whole) for path, whole in paths.items()]
    counts, named = Counter(short), zip(paths.items(), short, strict=True)
    return {name if counts[name] == 1 else path.as_posix(): whole for (path, whole), name in named}


def _short(path: Path, whole: Path) -> str:
    return path.as_posix() if whole.is_dir() else path.with_suffix("").as_posix()
