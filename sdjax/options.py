"""What the options of the `sdjax` command say: texts read and checked before anything slow is imported."""

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

MAX_PICTURES = 10_000
EMBEDDED_GUIDANCE = 3.0  # what suits Stable Diffusion burns the colours of the small model
STEM_LENGTH = 48  # characters of the prompt in a file name

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
    typer.Option("--prediction-type", help="What the model predicts [default: what the checkpoint says]"),
]


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Noise(StrEnum):
    jax = "jax"
    torch = "torch"
    cuda = "cuda"


class Spacing(StrEnum):
    leading = "leading"
    trailing = "trailing"
    linspace = "linspace"


def parse_lora(text: str) -> tuple[str, float]:
    """'style.safetensors:0.8' -> ('style.safetensors', 0.8); the weight is 1 by default."""
    match = re.fullmatch(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+))", text, re.ASCII)
    return (match[1], float(match[2])) if match else (text, 1.0)


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


def unused(words: Mapping[str, str], prompts: Iterable[str]) -> list[str]:
    """Of words (path -> word) a warning for each that is in none of these prompts."""
    absent = {path: word.lower() for path, word in words.items()}
    for prompt in prompts:
        if not absent:
            break
        absent = {path: word for path, word in absent.items() if word not in prompt.lower()}
    return [f"--embedding {path}: its word {words[path]!r} is in no prompt" for path in absent]


def parse_interval(said: str, text: str | None) -> tuple[float, float] | None:
    """'0.3:5' -> (0.3, 5.0), '0.3:inf' -> (0.3, inf); None -> None.

    Raises ValueError that begins with `said` unless it is two numbers, 0 <= low < high.
    """
    if text is None:
        return None
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        low, high = math.nan, math.nan
    if not 0 <= low < high:
        raise ValueError(f"{said}: {text!r} is not two noise levels LOW:HIGH, 0 <= LOW < HIGH, such as 0.3:5")
    return low, high


def interval_text(interval: tuple[float, float] | None) -> str | None:
    """(0.3, 5.0) -> '0.3:5.0', which `parse_interval` reads to the same numbers; None -> None."""
    return interval and ":".join(map(str, interval))


def parse_pair(option: str, text: str | None) -> tuple[int, int] | None:
    """'512x768' -> (512, 768); None -> None. Raises ValueError unless it is two positive whole numbers."""
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text, re.ASCII)
    if not match:
        raise ValueError(f"{option} {text}: not two positive whole numbers, such as 512x768")
    return int(match[1]), int(match[2])


def parse_seeds(text: str) -> list[int]:
    """'1,5,8:11' -> [1, 5, 8, 9, 10].

    Raises ValueError for a seed outside 0 .. 2^64 - 1, an empty range, a seed named twice, too many pictures.
    """
    said, seeds = f"--seeds {text}", []
    for part in seed_ranges(said, text):
        if len(seeds) + part.stop - part.start > MAX_PICTURES:
            raise ValueError(f"{said}: more than {MAX_PICTURES} pictures in one run")
        seeds += part
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{said}: names a seed twice")
    return seeds


def seed_ranges(said: str, text: str) -> Iterator[range]:
    """'1,8:11' -> range(1, 2), range(8, 11). Raises ValueError that begins with `said`, as `parse_seeds`."""
    from sdjax.arguments import MAX_SEED

    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?::(\d+))?", part.strip(), re.ASCII)
        if not match:
            raise ValueError(f"{said}: {part!r} is neither a seed (7) nor a range (0:16)")
        start = int(match[1])
        stop = start + 1 if match[2] is None else int(match[2])
        if not start < stop <= MAX_SEED + 1:
            raise ValueError(f"{said}: {part!r} names no seeds from 0 to 2^64 - 1")
        yield range(start, stop)


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


def check_new(path: Path, said: str) -> None:
    """Raises FileExistsError if there is anything of this name."""
    if os.path.lexists(path):
        raise FileExistsError(f"{said}: exists already; choose another name, or remove it")


def check_writable(folder: Path, said: str) -> None:
    """Raises FileNotFoundError where there is no such folder, PermissionError where nothing can be made in it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{said}: there is no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{said}: the folder {folder} cannot be written to")


def slug(prompt: str) -> str:
    """'A goose, on blue!' -> 'a-goose-on-blue'; 'image' where nothing is left."""
    return re.sub(r"\W+", "-", prompt.lower())[:STEM_LENGTH].strip("-") or "image"
