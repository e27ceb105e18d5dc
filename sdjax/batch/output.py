"""Where a job's pictures go: each chunk whole or not at all, as files or as WebDataset shards, through fsspec."""

import errno
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from sdjax.batch import manifest
from sdjax.fields import encodable
from sdjax.files import TEMPORARY, replacing, temporary_name, unfinished
from sdjax.pictures.metadata import FORMATS, slug
from sdjax.request.values import one_of

if TYPE_CHECKING:
    from sdjax.batch.plan import Chunk

FOLDER_SIZE = 1000  # pictures


@dataclass(frozen=True)
class Picture:
    """A finished picture of a job."""

    index: int
    """its place in the job"""
    id: str
    settings: Mapping[str, Any]
    """all that it was made with, as `sdjax.pictures.metadata.encode` takes it"""
    data: bytes
    """its file, encoded"""
    nsfw: bool | None
    """whether the safety checker flagged it; None: not checked"""
    seconds: float
    """its share of the time of the device"""


Content = Iterator[tuple[str, bytes, Sequence[Picture]]]
"""The files of a chunk: name below the target, bytes, the pictures in it"""


def _files(chunk: "Chunk", pictures: Sequence[Picture], suffix: str) -> Content:
    """images/000/000123-<seed>-<prompt>.png"""
    for picture in pictures:
        seed, prompt = picture.settings["seed"], slug(picture.settings["prompt"])
        folder = f"images/{picture.index // FOLDER_SIZE:03}"
        yield f"{folder}/{picture.index:06}-{seed}-{prompt}{suffix}", picture.data, [picture]


def _shard(chunk: "Chunk", pictures: Sequence[Picture], suffix: str) -> Content:
    """shards/<chunk>.tar: 000123-<seed> with .png, .json (settings, id, index, nsfw) and .txt (prompt) for each."""
    from webdataset.writer import TarWriter

    file = io.BytesIO()
    with TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as writer:
        for picture in pictures:
            known = {**picture.settings, "id": picture.id, "index": picture.index, "nsfw": picture.nsfw}
            writer.write(
                {
                    "__key__": f"{picture.index:06}-{picture.settings['seed']}",
                    suffix.removeprefix("."): picture.data,
                    "json": encodable(json.dumps(known, ensure_ascii=False, allow_nan=False)).encode(),
                    "txt": picture.settings["prompt"].encode(),
                }
            )
    yield f"shards/{chunk.id}.tar", file.getvalue(), pictures


LAYOUTS: Mapping[str, Callable[["Chunk", Sequence[Picture], str], Content]] = {"files": _files, "webdataset": _shard}
NEEDED = {"files": ("pyarrow",), "webdataset": ("pyarrow", "webdataset")}


@dataclass(frozen=True)
class Target:
    """A folder, of this machine or of an object store; see `open_target`."""

    url: str
    fs: AbstractFileSystem
    root: str
    """its path on fs"""

    def path(self, name: str) -> str:
        """The path on fs of what has this name below the target."""
        return f"{self.root}/{name}"

    def shown(self, name: str) -> str:
        """The path or URL, for people, of what has this name."""
        return f"{self.url.rstrip('/')}/{name}"

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine."""
        return isinstance(self.fs, LocalFileSystem)

    def check(self) -> None:
        """Raises OSError that names the target where nothing can be written there. Makes no folder."""
        if not self.is_local:
            self.probe()
            return
        with _errors_of(self.url, "written"):
            there = next(path for path in (Path(self.root or "/"), *Path(self.root).parents) if path.exists())
            if not there.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, f"{there} is no folder")
            if not os.access(there, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def probe(self) -> None:
        """Makes the folder, writes a file and removes it. Raises OSError that names the target where that fails."""
        name = self.path(temporary_name())
        with _errors_of(self.url, "written"):
            if self.is_local:
                os.makedirs(self.root, exist_ok=True)
            with unfinished(Path(name)) if self.is_local else nullcontext():
                self.fs.pipe_file(name, b"sdjax")
                self.fs.rm_file(name)

    def sweep(self) -> int:
        """Removes what killed writers left, and returns how many files that were. No other run may be writing."""
        if not self.is_local:
            return 0  # what an object store has not wholly received has no name
        left = [
            Path(folder, name) for folder, _, names in os.walk(self.root) for name in names if TEMPORARY.fullmatch(name)
        ]
        for path in left:
            path.unlink(missing_ok=True)
        return len(left)

    def write(self, name: str, data: bytes) -> None:
        """Makes or replaces a file, whole or not at all. Raises OSError that names it."""
        write_whole(self.fs, self.path(name), data)

    def write_all(self, files: Mapping[str, bytes]) -> None:
        """Makes or replaces files, each whole or not at all. Raises OSError that names the file or the target."""
        if self.is_local:
            for name, data in files.items():
                self.write(name, data)
            return
        with _errors_of(self.url, "written"):
            self.fs.pipe({self.path(name): data for name, data in files.items()})  # at the same time

    def read(self, name: str) -> bytes | None:
        """The bytes of a file; None where there is none."""
        path = self.path(name)
        with suppress(FileNotFoundError), _errors_of(self.shown(name), "read"):
            if self.is_local and os.path.exists(path) and not os.path.isfile(path):
                raise OSError("no regular file")
            return self.fs.cat_file(path)
        return None

    def size(self, name: str) -> int | None:
        """The bytes in a file; None where there is none."""
        with suppress(FileNotFoundError), _errors_of(self.shown(name), "read"):
            return self.fs.info(self.path(name))["size"]
        return None

    def names(self) -> list[str]:
        """The names of what is in the target itself."""
        with suppress(FileNotFoundError), _errors_of(self.url, "read"):
            return [PurePosixPath(path).name for path in self.fs.ls(self.root, detail=False)]
        return []


def open_target(url: str | os.PathLike) -> Target:
    """The target at a path or a URL (memory://, s3://, gs:// and what else fsspec knows); touches nothing.

    Raises ValueError for a URL that fsspec does not know or cannot open, or whose package is not installed.
    """
    url = os.fspath(url)
    if not url.strip():
        raise ValueError("a target without a name: give a folder, or a URL such as s3://bucket/folder")
    if "::" in url:
        raise ValueError(f"{url}: a chain of URLs, by ::, is no target; give a folder, or the URL of one store")
    if re.match(r"(file|local)://(?![/~])", url):
        raise ValueError(f"{url}: a URL of a file has three slashes and the whole path, file:///folder")
    try:
        fs, root = url_to_fs(url, use_listings_cache=False)  # other processes write there
    except ImportError as error:
        raise ValueError(f"{url}: this kind of target needs a package that is not installed: {error}") from error
    except Exception as error:  # kinds of targets have errors of their own
        raise ValueError(f"{url}: not a path or URL that can be written to: {_reason(error)}") from error
    return Target(url, fs, root.rstrip("/"))


def write_whole(fs: AbstractFileSystem, path: str, data: bytes) -> None:
    """Makes or replaces a file so that a reader never sees half of it. Raises OSError that names it."""
    with _errors_of(path, "written"):
        if isinstance(fs, LocalFileSystem):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_bytes(data)
        else:
            fs.pipe_file(path, data)


@contextmanager
def _errors_of(place: str, done: str) -> Iterator[None]:
    """Makes what file systems raise, of many kinds, an OSError that says which place cannot be written or read."""
    try:
        yield
    except Exception as error:
        if done == "read" and isinstance(error, FileNotFoundError):
            raise
        if isinstance(error, OSError) and error.errno:
            raise OSError(error.errno, f"cannot be {done}: {error.strerror}", place) from error
        raise OSError(f"{place}: cannot be {done}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, NotImplementedError):
        return "this kind of target can only be read"
    return " ".join(str(error).split()) or type(error).__name__


def require(*packages: str) -> None:
    """Raises ValueError that names what to install where one of these is missing."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise ValueError(f'a batch job needs {" and ".join(missing)}: pip install "sdjax[batch]"')


@dataclass(frozen=True)
class Output:
    """The pictures of a job at a target, in one of the LAYOUTS and one of the FORMATS of pictures.

    Raises ValueError for another one, and where a package is not installed.
    """

    target: Target
    layout: str
    format: str
    fingerprint: str
    """of the model"""

    def __post_init__(self) -> None:
        one_of("layout", self.layout, LAYOUTS)
        one_of("format", self.format, FORMATS)
        require(*NEEDED[self.layout])

    def commit(self, chunk: "Chunk", pictures: Sequence[Picture]) -> list[str]:
        """Writes the pictures of a chunk, then its part of the manifest; returns the names of the files.

        Of a chunk that lacks pictures there is no part, so that it is not finished. What is there of an earlier attempt
        is replaced. Raises OSError that names what cannot be written.
        """
        if not pictures:
            return []
        versions = {name: version(name) for name in ("sdjax", "jax")}
        files, rows = {}, []
        for name, data, members in LAYOUTS[self.layout](chunk, pictures, FORMATS[self.format].suffix):
            files[name] = data
            file = {"file": name, "bytes": len(data), "sha256": _sha256(data)}
            for picture in members:
                own = {key: getattr(picture, key) for key in ("id", "index", "nsfw", "seconds")}
                rows.append(manifest.row(picture.settings, **own, **file, **versions, fingerprint=self.fingerprint))
        self.target.write_all(files)
        if len(pictures) == len(chunk):
            self.target.write(manifest.part(chunk.id), manifest.dump(rows))
        return list(files)

    def finished(self, chunk: "Chunk", *, verify: bool = False) -> bool:
        """Whether the chunk was committed and its files still have their sizes; verify: and their SHA-256."""
        data = self.target.read(manifest.part(chunk.id))
        rows = manifest.load(data) if data else None
        files = sorted({(row["file"], row["bytes"], row["sha256"]) for row in rows or ()})
        return bool(files) and all(
            self.target.size(name) == size and not (verify and _sha256(self.target.read(name) or b"") != digest)
            for name, size, digest in files
        )

    def committed(self) -> set[str]:
        """The ids of the chunks that have a part in the manifest, found without reading any."""
        with _errors_of(self.target.url, "read"):
            return manifest.chunks(self.target.fs, self.target.root)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
