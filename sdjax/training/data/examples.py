"""Pictures with their captions, checked before anything slow begins."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sdjax.pictures import picture
from sdjax.pictures.picture import Picture
from sdjax.training.data.known import Known

MOST_ENLARGED = 4  # times a side: of smaller pictures little but blur is learnt


@dataclass(frozen=True)
class Found:
    """A picture of a data set as it is listed, before its file is read."""

    path: Path
    caption: str | None
    """None: it has none"""
    control: Path | None = None
    """what a ControlNet is shown"""
    mask: Path | None = None
    """white where the picture is learnt"""
    repeats: int = 1
    """how many times it counts"""


@dataclass(frozen=True)
class Example:
    """A picture that can be read, with its caption: the same in words as `Found`."""

    picture: Picture
    caption: str
    control: Picture | None = None
    mask: Picture | None = None
    repeats: int = 1


class DataError(ValueError):
    """A data set that cannot be trained on: what is wrong, with counts, then a line for each picture."""


def checked(
    found: Sequence[Found],
    *,
    where: str,
    known: Known | None = None,
    caption: str | None = None,
    least: int = 1,
    paired: bool = False,
) -> list[Example]:
    """The examples, each of whose files has been read whole, now or by an earlier run that wrote `known`.

    caption: of those that have none. least: pixels of the shorter side of a picture. paired: whether a ControlNet is
    to be shown something for each.

    Raises DataError that lists by name all that cannot be used: what cannot be read, what is too small, what has no
    caption, or no picture for a ControlNet.
    """
    problems: dict[str, list[str]] = {}

    def note(kind: str, text: str) -> None:
        problems.setdefault(kind, []).append(text)

    examples = []
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for one, read in zip(found, threads.map(partial(_read, known), found), strict=True):
            text = one.caption if one.caption is not None else caption
            if text is None:
                note("without a caption", str(one.path))
            if paired and one.control is None:
                note("without a conditioning image", str(one.path))
            for error in read.errors:
                note("not readable", error)
            if read.own is not None and min(read.own.size) < least:
                note("too small", _small(read.own, least))
            if read.own is not None:
                examples.append(Example(read.own, text or "", read.control, read.mask, one.repeats))
    if known is not None:
        known.keep(path for one in found for path in (one.path, one.control, one.mask) if path is not None)
    if problems:
        counts = ", ".join(f"{len(texts)} {kind}" for kind, texts in problems.items())
        lines = [f"{kind}: {text}" for kind, texts in problems.items() for text in texts]
        hint = f"{NO_CAPTION}:" if "without a caption" in problems else ""
        raise DataError("\n".join([f"{where}: of {len(found)} pictures {counts}: {hint}", *lines]))
    return examples


def check_sizes(examples: Sequence[Example], least: int, where: str) -> None:
    """Raises DataError that lists those whose shorter side has fewer pixels than `least`."""
    small = [_small(example.picture, least) for example in examples if min(example.picture.size) < least]
    if small:
        lines = [f"too small: {text}" for text in small]
        raise DataError("\n".join([f"{where}: of {len(examples)} pictures {len(small)} too small:", *lines]))


def _small(own: Picture, least: int) -> str:
    width, height = own.size
    return f"{own.path} ({width}x{height}; the shorter side needs {least} pixels)"


NO_CAPTION = (
    "captions are in a .txt or .caption file beside the picture, in metadata.jsonl, or the name of a folder N_caption; "
    "or give one for all of these by --instance-prompt"
)


@dataclass(frozen=True)
class _Files:
    own: Picture | None
    control: Picture | None
    mask: Picture | None
    errors: tuple[str, ...]


def _read(known: Known | None, one: Found) -> _Files:
    errors: list[str] = []

    def read(path: Path | None) -> Picture | None:
        if path is None:
            return None
        try:
            return picture.read("", path) if known is None else known.picture(path)
        except ValueError as error:
            errors.append(str(error).removeprefix(": "))
            return None

    own, control, mask = read(one.path), read(one.control), read(one.mask)
    return _Files(own, control, mask, tuple(errors))


def total(examples: Iterable[Example]) -> int:
    """How many pictures one pass over the data has, repeats counted."""
    return sum(example.repeats for example in examples)
