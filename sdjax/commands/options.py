"""Options of the `sdjax` command, read and checked before anything slow is imported."""

import os
import re
import sys
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sdjax import files

MODEL_HELP = "A diffusers folder, a weight file or a Hub id [default: the embedded model]"
Variant = Annotated[
    str | None, typer.Option(help="Take the weight files of this variant, such as fp16", show_default=False)
]
Revision = Annotated[
    str | None, typer.Option(help="A branch, tag or commit of the model's Hub repository", show_default=False)
]


class PredictionType(StrEnum):
    epsilon = "epsilon"
    v_prediction = "v_prediction"
    sample = "sample"


Prediction = Annotated[
    PredictionType | None,
    typer.Option("--prediction-type", help="What the model predicts [default: the checkpoint's]"),
]


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def parse_pair(option: str, text: str | None) -> tuple[int, int] | None:
    """'512x768' -> (512, 768); None -> None. Raises ValueError unless it is two positive whole numbers."""
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text, re.ASCII)
    if not match:
        raise ValueError(f"{option} {text}: not two positive whole numbers, such as 512x768")
    return int(match[1]), int(match[2])


def parse_embeddings(texts: Iterable[str]) -> dict[str, str | None]:
    """['cat.pt:<cat>', 'dog.pt'] -> {'cat.pt': '<cat>', 'dog.pt': None}: path -> the word for it, None: its own.

    What exists is a path, colons and all; of another text the path ends at the first colon that is not of a drive
    (C:\\cat.pt) or an address (https://…). Raises ValueError for two words for one path.
    """
    pairs = list(dict.fromkeys(map(_parse_embedding, texts)))
    if len(dict(pairs)) < len(pairs):
        raise ValueError("--embedding: gives one file two words")
    return dict(pairs)


def _parse_embedding(text: str) -> tuple[str, str | None]:
    colons = [i for i, sign in enumerate(text) if sign == ":" and 0 < i < len(text) - 1]
    for end in (len(text), *reversed(colons)):
        if os.path.exists(text[:end]):
            return text[:end], text[end + 1 :] or None
    match = re.fullmatch(r"((?:[A-Za-z]:(?=[\\/])|\w+:(?=//))?[^:]+)(?::(.+))?", text, re.DOTALL)
    return (match[1], match[2]) if match else (text, None)


def check_out(out: Path | None, *, pictures: int) -> None:
    """Raises ValueError or OSError where `save` could not write that many pictures."""
    out = out or Path()
    if not out.is_dir():
        if out.suffix.lower() != ".png":
            raise ValueError(f"--out {out}: neither a .png file nor a folder that exists")
        if pictures > 1:
            raise ValueError(f"--out {out}: one file for {pictures} pictures; name a folder, or add --grid")
        check_new(out, f"--out {out}")
    check_writable(out if out.is_dir() else out.parent, f"--out {out}")


def check_new(path: Path, name: str) -> None:
    """Raises FileExistsError if there is anything of this name."""
    if os.path.lexists(path):
        raise FileExistsError(f"{name}: exists already; choose another name, or remove it")


def check_writable(folder: Path, name: str) -> None:
    """Raises FileNotFoundError where there is no such folder, PermissionError where nothing can be made in it.

    Removes what commands that were killed left there.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}: there is no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{name}: the folder {folder} cannot be written to")
    files.sweep(folder)


def print_warning(message: Warning | str, *_: object) -> None:
    """One line on stderr."""
    print(f"warning: {message}", file=sys.stderr)
