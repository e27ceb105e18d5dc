"""Files of a folder by name: what requests may choose from. Nothing of them is loaded."""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from sdjax.fields import brief
from sdjax.request.elsewhere import hint

WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
INDEX, CONFIG = "model_index.json", "config.json"
CONTROLNETS = ("controlnet",)
UPSCALERS = ("esrgan", "realesrgan", "upscale_models")
OTHERS = ("lora", "loras", "vae", "vae-approx", "vae_approx", "embeddings", "hypernetworks", "clip_vision")
"""What folders within that of the models are called, in any case, whose files are no models: as the web UI and ComfyUI
call them"""
FRESH = 2.0  # seconds for which a list is good
DEPTH = 4  # folders within folders


class Unknown(ValueError):
    """There is nothing of this name."""


class Catalog:
    """What a folder has, by name: the path within it, without the suffix unless that tells it from another.

    kind: what messages call it. find: the files of the folder; by default the weight files. within: names of folders,
    in lower case, to which it is limited; names begin after them.
    """

    def __init__(
        self,
        kind: str,
        folder: Path | None,
        find: Callable[[Path], Iterator[Path]] | None = None,
        within: Collection[str] = (),
    ):
        self.kind, self._folder, self._find, self._within = kind, folder, find or weight_files, within
        self._paths: Mapping[str, Path] = {}
        self._read = -FRESH

    @property
    def paths(self) -> Mapping[str, Path]:
        """By name, sorted; read again where the list is older than FRESH."""
        if self._folder is not None and time.monotonic() - self._read > FRESH:
            self._paths, self._read = self._named(self._folder), time.monotonic()
        return self._paths

    def _named(self, folder: Path) -> dict[str, Path]:
        paths = {path.relative_to(folder): path for path in self._find(folder)}
        if self._within:
            paths = {path: whole for path, whole in paths.items() if _after(path, self._within) is not None}
        short = [_short(_after(path, self._within) or path, whole) for path, whole in paths.items()]
        counts, named = Counter(short), zip(paths.items(), short, strict=True)
        return dict(sorted((name if counts[name] == 1 else path.as_posix(), whole) for (path, whole), name in named))

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
        if path.name.lower() in (*CONTROLNETS, *UPSCALERS, *OTHERS) and path.is_dir():
            continue
        if (path / INDEX).is_file():
            yield path
        elif path.is_dir():
            yield from models(path, depth - 1) if depth else ()
        elif path.suffix.lower() in WEIGHTS:
            yield path


def networks(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """Networks alone: weight files, and folders as diffusers has them."""
    for path in _entries(folder):
        if (path / CONFIG).is_file() and not (path / INDEX).is_file():
            yield path
        elif path.is_dir():
            yield from networks(path, depth - 1) if depth else ()
        elif path.suffix.lower() in WEIGHTS:
            yield path


def _after(path: Path, names: Collection[str]) -> Path | None:
    """What follows the first folder of one of these names; None: there is none."""
    found = (i for i, part in enumerate(path.parts[:-1], 1) if part.lower() in names)
    return (start := next(found, None)) and Path(*path.parts[start:])


def _entries(folder: Path) -> list[Path]:
    """Those that are not hidden; none where the folder cannot be read."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return []


def _short(path: Path, whole: Path) -> str:
    return path.as_posix() if whole.is_dir() else path.with_suffix("").as_posix()
