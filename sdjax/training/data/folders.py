"""Data sets that are folders: captions beside pictures, in metadata.jsonl, or in the names of folders."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdjax.fields import brief
from sdjax.training.data.examples import DataError, Found

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".tga")
CAPTIONS = (".txt", ".caption")
METADATA = "metadata.jsonl"
REPEATED = re.compile(r"(\d+)_(.+)", re.DOTALL)
"""The name of a folder whose pictures count so many times, and the caption of those that have none (kohya)"""

FILE, TEXT = ("file_name",), ("text", "caption")
CONTROL = ("conditioning_image", "conditioning_image_file_name")
MASK = ("mask", "mask_file_name")
"""Keys of a line of metadata.jsonl: the first that is there"""


def read(folder: Path) -> list[Found]:
    """The pictures of a folder and of those in it, in the order of their names.

    Those that metadata.jsonl lists, if it is there; else all files that are named like pictures. What is hidden is
    left out. Raises DataError for no pictures, and for metadata or captions that cannot be read.
    """
    metadata = folder / METADATA
    found = _listed(folder, metadata) if metadata.is_file() else _beside(folder)
    if not found:
        raise DataError(f"{folder}: no pictures in it ({', '.join(PICTURES)})")
    return found


def _beside(folder: Path) -> list[Found]:
    found = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.suffix.lower() in PICTURES and path.is_file() and not any(part[0] == "." for part in inside.parts):
            repeats, name = _repeats(inside.parent)
            caption = _caption(path)
            found.append(Found(path, name if caption is None else caption, repeats=repeats))
    return found


def _repeats(inside: Path) -> tuple[int, str | None]:
    """(10, "sks dog") of a path through a folder 10_sks dog, the innermost one; else (1, None)."""
    for part in reversed(inside.parts):
        if match := REPEATED.fullmatch(part):
            return int(match[1]), match[2].strip()
    return 1, None


def _caption(path: Path) -> str | None:
    """What the file beside a picture has, in one line; None: there is none."""
    for ending in CAPTIONS:
        beside = path.with_suffix(ending)
        if beside.is_file():
            return text_of(str(beside), beside.read_bytes())
    return None


def text_of(name: str, data: bytes) -> str:
    """A caption in one line. Raises DataError for what is no text in UTF-8."""
    try:
        return " ".join(data.decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not text in UTF-8: {error}") from None


def _listed(folder: Path, metadata: Path) -> list[Found]:
    found, wrong = [], []
    for number, line in enumerate(text_lines(metadata), 1):
        try:
            if line.strip():
                found.append(_of_line(folder, json.loads(line)))
        except (ValueError, RecursionError) as error:
            wrong.append(f"line {number}: {error}")
    if wrong:
        raise DataError("\n".join([f"{metadata}: {len(wrong)} lines cannot be read:", *wrong]))
    return found


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a file. Raises DataError for what is no text in UTF-8."""
    try:
        yield from path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not text in UTF-8: {error}") from None


def _of_line(folder: Path, line: Any) -> Found:
    if not isinstance(line, dict):
        raise ValueError(f"not an object, but {brief(line)}")
    values = [_first(line, names) for names in (FILE, TEXT, CONTROL, MASK)]
    if values[0] is None:
        raise ValueError("has no file_name")
    path, control, mask = (None if name is None else _within(folder, name) for name in (values[0], *values[2:]))
    caption = None if values[1] is None else " ".join(values[1].split())
    return Found(path, caption, control, mask)


def _first(line: dict, names: tuple[str, ...]) -> str | None:
    value = next((line[name] for name in names if line.get(name) is not None), None)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{names[0]}: must be text, not {brief(value)}")
    return value


def _within(folder: Path, name: str) -> Path:
    """The path of a file that metadata names. Raises ValueError for one outside of the folder."""
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{brief(name)} is outside of the folder")
    return path
