"""Data sets that are no folder of this machine: shards of the WebDataset, and URLs, copied to one first."""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from sdjax.files import creating_folder, replacing
from sdjax.training.data.examples import DataError
from sdjax.training.data.folders import CAPTIONS, METADATA, PICTURES, text_of
from sdjax.training.data.store import key_of

TEXTS = tuple(ending.lstrip(".") for ending in CAPTIONS)
FIELD = {"mask": "mask", "conditioning": "conditioning_image"}
"""Parts of a sample beside its picture, as in 000.conditioning.png, and their keys in metadata.jsonl"""


def is_url(data: str) -> bool:
    """Whether this is an address such as s3://bucket/folder, not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", data) is not None


def local(data: str, cache: Path) -> Path:
    """The folder of a data set: its own, or a copy in the cache of shards ({000..012}.tar is several) or of a URL.

    A copy is whole or not there, and made once for each address: remove it where what is there has changed.
    Raises FileNotFoundError where there is nothing, DataError for what is no data set, ValueError: a package lacks.
    """
    is_tar = data.lower().endswith(".tar")
    if not is_tar and not is_url(data):
        if not Path(data).is_dir():
            raise FileNotFoundError(f"{data}: there is no such folder")
        return Path(data)
    folder = cache / "copies" / key_of(data)
    if not folder.is_dir():
        require("fsspec", *(["webdataset"] if is_tar else []))
        folder.parent.mkdir(parents=True, exist_ok=True)
        with creating_folder(folder) as temporary, _named(data):
            (_unpack if is_tar else _fetch)(data, temporary)
    return folder


def require(*packages: str, extra: str = "train") -> None:
    """Raises ValueError that names what to install where one of these is missing."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise ValueError(f'training needs {" and ".join(missing)}: pip install "sdjax[{extra}]"')


@contextmanager
def _named(data: str) -> Iterator[None]:
    """Raises OSError that names the data for what file systems raise of their own, such as a missing package."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise OSError(f"{data}: {error or type(error).__name__}") from error


def _fetch(url: str, folder: Path) -> None:
    """Copies the pictures, captions and metadata of a folder at a URL."""
    import fsspec

    fs, root = fsspec.core.url_to_fs(url)
    if not fs.exists(root):
        raise FileNotFoundError(f"{url}: there is no such folder")
    wanted = (*PICTURES, *CAPTIONS)
    for path in sorted(fs.find(root)):
        inside = PurePosixPath(path).relative_to(PurePosixPath(root))
        if inside.suffix.lower() in wanted or str(inside) == METADATA:
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(path, str(folder / inside))


def _unpack(urls: str, folder: Path) -> None:
    """Writes the samples of shards as numbered pictures with their captions in metadata.jsonl."""
    lines = []
    for number, sample in enumerate(_samples(urls)):
        lines.append(json.dumps(_written(sample, folder, f"{number:08}"), ensure_ascii=False, allow_nan=False))
    with replacing(folder / METADATA) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def _samples(urls: str) -> Iterator[Mapping[str, Any]]:
    import fsspec
    from webdataset.shardlists import expand_urls
    from webdataset.tariterators import group_by_keys, tar_file_expander

    opened = ({"url": url, "stream": stream} for url in expand_urls(urls) for stream in _streams(fsspec, url))
    return group_by_keys(tar_file_expander(opened))


def _streams(fsspec: Any, url: str) -> Iterator[Any]:
    with fsspec.open(url, "rb") as stream:
        yield stream


def _written(sample: Mapping[str, Any], folder: Path, name: str) -> dict[str, str]:
    """Writes the pictures of a sample; its line of metadata.jsonl."""
    where, line = f"{sample['__url__']}: {sample['__key__']}", {}
    for ending, data in sample.items():
        *what, kind = ending.lower().split(".")
        if f".{kind}" in PICTURES:
            field = next((FIELD[part] for part in what if part in FIELD), "file_name")
            file = f"{name}.{ending.lower()}"
            if field in line:
                raise DataError(f"{where}: has two pictures, {line[field]} and {file}")
            (folder / file).write_bytes(data)
            line[field] = file
        elif kind in TEXTS:
            line["text"] = text_of(where, data)
        elif kind == "json":
            line |= itertools.islice(_caption_of(where, data), 1)
    if "file_name" not in line:
        raise DataError(f"{where}: has no picture ({', '.join(PICTURES)})")
    return line


def _caption_of(where: str, data: bytes) -> Iterator[tuple[str, str]]:
    """("text", the caption) of the JSON of a sample, as sdjax batch and img2dataset write it."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: its JSON cannot be read: {error}") from None
    for name in ("text", "caption", "prompt"):
        if isinstance(content, dict) and isinstance(content.get(name), str):
            yield "text", content[name]
