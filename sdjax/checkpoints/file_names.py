"""What weight files are called in a folder: by format, by variant, in one piece or in shards with an index."""

import re
from collections.abc import Collection, Iterable

FILES = {
    "diffusion_pytorch_model": (
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.bin",
        "diffusion_flax_model.msgpack",
    ),
    "model": ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack"),
}
"""By stem, in diffusers and in transformers: safetensors, PyTorch's pickles, Flax's msgpack; the first is preferred."""

INDEX = ".index.json"
"""Follows the name of a file in the name of the index of its shards"""


def with_variant(name: str, variant: str | None) -> str:
    """("model.safetensors.index.json", "fp16") -> "model.safetensors.index.fp16.json"."""
    start, _, suffix = name.rpartition(".")
    return f"{start}.{variant}.{suffix}" if variant else name


def choose(names: Collection[str], stem: str, variant: str | None) -> str | None:
    """The file, or the index of shards, that holds a model's weights: of the variant if there is one, else of none."""
    for spelling in (variant, None):
        for name in FILES[stem]:
            for candidate in (with_variant(name, spelling), with_variant(name + INDEX, spelling)):
                if candidate in names:
                    return candidate
    return None


def variants(names: Iterable[str], stem: str) -> list[str]:
    """Every v for which `choose(names, stem, v)` finds a file of that variant."""
    spellings = [with_variant(name + end, "*") for name in FILES[stem] for end in ("", INDEX)]
    patterns = [re.escape(spelling).replace(r"\*", r"(\w+)") for spelling in spellings]
    return sorted({match[1] for name in names for pattern in patterns if (match := re.fullmatch(pattern, name))})


def shards(names: Iterable[str], index: str) -> list[str]:
    """Of these names those of an index's shards.

    model.safetensors.index.fp16.json: model.fp16-00001-of-00002.safetensors or model-00001-of-00002.fp16.safetensors.
    """
    stem, suffix, *_, variant, _ = index.replace(INDEX, ".index..json").split(".")
    number, dotted = r"-\d+-of-\d+", re.escape(f".{variant}" if variant else "")
    pattern = rf"{re.escape(stem)}({dotted}{number}|{number}{dotted})\.{suffix}"
    return [name for name in names if re.fullmatch(pattern, name)]
