"""IP-Adapter files (arXiv:2308.06721): what kind they are, from the names and shapes of their tensors."""

import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from tokenize import TokenError
from typing import Any, NamedTuple

import numpy as np

from sdjax.checkpoints import pickles, weights
from sdjax.checkpoints.content import format_of
from sdjax.checkpoints.errors import CheckpointError
from sdjax.checkpoints.lora import FAMILIES
from sdjax.checkpoints.lora_kinds import LowRank

FACE_PLUS = "image_proj.perceiver_resampler."
LORA = re.compile(r"ip_adapter\.(\d{1,3})\.to_(q|k|v|out)_lora\.(up|down)\.weight")
LAYERS = re.compile(r"image_proj\.layers\.(\d{1,3})\.")
CONTEXT = "ip_adapter.1.to_k_ip.weight"

LAST = {"plain": "image_proj.proj.weight", "face": "image_proj.proj.2.weight"}
"""What makes the tokens, all at once"""

Shapes = Mapping[str, tuple[int, ...]]


class Read(NamedTuple):
    """A file of an IP-Adapter."""

    config: dict[str, Any]
    """what `IPAdapterConfig` has beside the UNet's layers"""
    tensors: dict[str, np.ndarray]
    factors: dict[tuple[int, str], dict[str, np.ndarray]]
    """up and down of a LoRA, in those of faces: by the number of the UNet's attention and q, k, v or out"""


def read(path: Path, width: int) -> Read:
    """An IP-Adapter for a UNet with text states of this width.

    Raises CheckpointError for a file of another kind, or for another family.
    """
    tensors, factors = {}, {}
    for name, array in _open_tensors(path).items():
        if match := LORA.fullmatch(name):
            factors.setdefault((int(match[1]), match[2]), {})[match[3]] = array
        else:
            tensors[name] = array
    shapes = {name: array.shape for name, array in tensors.items()}
    if any(name.startswith(FACE_PLUS) for name in shapes):
        raise CheckpointError(
            f"{path}: an IP-Adapter FaceID Plus, which needs insightface and the image encoder at once: it is not "
            "supported; those called FaceID alone are"
        )
    try:
        config, theirs = _config(shapes), shapes[CONTEXT][1]
        if last := LAST.get(config["kind"]):
            config["tokens"] = shapes[last][0] // theirs
    except (LookupError, ValueError, ArithmeticError):
        raise CheckpointError(f"{path}: no IP-Adapter: it has no image_proj and {CONTEXT} of a known kind") from None
    if theirs != width:
        file, model = (f"{FAMILIES.get(n, 'a model')} (text states of width {n})" for n in (theirs, width))
        raise CheckpointError(f"{path}: an IP-Adapter for {file}, and this is {model}")
    return Read(config | {"context_channels": width}, tensors, factors)


def image_embeds(value: Any) -> list[Any]:
    """The embeddings of each adapter: those of a list, or of one array; or of a file, in order: NumPy's, safetensors
    (by name), or PyTorch's of one tensor or a list of them. Raises CheckpointError for another file."""
    if isinstance(value, str | PathLike):
        value = _embeds_in(Path(value))
    return list(value) if isinstance(value, list | tuple) else [value]


def _embeds_in(path: Path) -> Any:
    if path.suffix == ".npy":
        try:
            return np.array(np.lib.format.open_memmap(path, mode="r"))  # whose size is checked before it is read
        except (ValueError, SyntaxError, TokenError, OverflowError, IsADirectoryError) as error:
            raise CheckpointError(f"{path}: no array: {error}") from None
    if format_of(path) != "pickle":
        tensors = weights.open_tensors(path)
        return [tensors[name] for name in sorted(tensors)]
    value = pickles.load(path)
    listed = value if isinstance(value, list | tuple) else [value]
    if not listed or not all(isinstance(own, np.ndarray) for own in listed):
        raise CheckpointError(f"{path}: no embeddings of pictures: neither a tensor nor a list of them")
    return listed


def _open_tensors(path: Path) -> dict[str, np.ndarray]:
    """By name; PyTorch's pickles have a dict for each half of it."""
    if format_of(path) != "pickle":
        return dict(weights.open_tensors(path))
    value = pickles.load(path)
    halves = value.items() if isinstance(value, Mapping) else ()
    return {
        f"{half}.{name}": array
        for half, own in halves
        for name, array in (own.items() if isinstance(own, Mapping) else ())
        if isinstance(array, np.ndarray)
    }


def lora(
    path: Path, found: Read, blocks: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, dict[str, LowRank]]:
    """The LoRA of a file, as `lora.read` has it, for a UNet with these transformer blocks, in PyTorch's order, and
    parameters. Raises CheckpointError for one that does not fit."""
    layers = {}
    for (number, part), factors in found.factors.items():
        block = blocks[number // 2] if number < 2 * len(blocks) else f"block {number // 2}"
        name = f"{block}.attn{1 + number % 2}.to_{part}{'.0' if part == 'out' else ''}.weight"
        up, down = (factors.get(side, np.zeros((0, 0))) for side in ("up", "down"))
        if up.ndim != 2 or up.shape[1:] != down.shape[:1] or (len(up), *down.shape[1:]) != shapes.get(name):
            raise CheckpointError(f"{path}: the LoRA in it does not fit this UNet: {name}")
        if not (np.isfinite(up).all() and np.isfinite(down).all()):
            raise CheckpointError(f"{path}: the LoRA in it is not finite (NaN or infinity): {name}")
        layers[name] = LowRank(np.array(down), np.array(up), 1.0)  # copies: those are views of the file
    return {"unet": layers} if layers else {}


def _config(shapes: Shapes) -> dict[str, Any]:
    if "image_proj.proj.weight" in shapes:
        return {"kind": "plain", "image_channels": shapes["image_proj.proj.weight"][1]}
    if "image_proj.proj.3.weight" in shapes:
        return {"kind": "full", "image_channels": shapes["image_proj.proj.0.weight"][1]}
    if "image_proj.norm.weight" in shapes:
        width, channels = shapes["image_proj.proj.0.weight"]
        return {"kind": "face", "image_channels": channels, "width": width}
    _, tokens, width = shapes["image_proj.latents"]
    return {
        "kind": "plus",
        "image_channels": shapes["image_proj.proj_in.weight"][1],
        "tokens": tokens,
        "width": width,
        "inner": shapes["image_proj.layers.0.0.to_q.weight"][0],
        "depth": len({match[1] for name in shapes if (match := LAYERS.match(name))}),
    }
