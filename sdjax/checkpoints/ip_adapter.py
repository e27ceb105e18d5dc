"""IP-Adapter files (arXiv:2308.06721): what kind they are, from the names and shapes of their tensors."""

import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.checkpoints import pickles, weights
from sdjax.checkpoints.content import format_of
from sdjax.checkpoints.errors import CheckpointError
from sdjax.checkpoints.lora import FAMILIES

FACE_ID = re.compile(r"perceiver_resampler\.|_lora\.")
LAYERS = re.compile(r"image_proj\.layers\.(\d{1,3})\.")
CONTEXT = "ip_adapter.1.to_k_ip.weight"

Shapes = Mapping[str, tuple[int, ...]]


def read(path: Path, width: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `IPAdapterConfig` has beside the UNet's layers, and the tensors, for a UNet with text states of this width.

    Raises CheckpointError for a file of another kind, or for another family.
    """
    tensors = _open_tensors(path)
    shapes = {name: array.shape for name, array in tensors.items()}
    if FACE_ID.search("\n".join(shapes)) or {"image_proj.proj.2.weight", "image_proj.norm.weight"} <= shapes.keys():
        raise CheckpointError(f"{path}: an IP-Adapter of faces' identities (FaceID), which is not supported")
    try:
        config, theirs = _config(shapes), shapes[CONTEXT][1]
        if config["kind"] == "plain":
            config["tokens"] = shapes["image_proj.proj.weight"][0] // theirs
    except (LookupError, ValueError, ArithmeticError):
        raise CheckpointError(f"{path}: no IP-Adapter: it has no image_proj and {CONTEXT} of a known kind") from None
    if theirs != width:
        file, model = (f"{FAMILIES.get(n, 'a model')} (text states of width {n})" for n in (theirs, width))
        raise CheckpointError(f"{path}: an IP-Adapter for {file}, and this is {model}")
    return config | {"context_channels": width}, tensors


def image_embeds(value: Any) -> list[Any]:
    """The embeddings of each adapter: those of a list, or of one array; or of a file, in order: NumPy's, safetensors
    (by name), or PyTorch's of one tensor or a list of them. Raises CheckpointError for another file."""
    if isinstance(value, str | PathLike):
        value = _embeds_in(Path(value))
    return list(value) if isinstance(value, list | tuple) else [value]


def _embeds_in(path: Path) -> Any:
    if path.suffix == ".npy":
        try:
            return np.load(path, allow_pickle=False)
        except ValueError as error:
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


def _config(shapes: Shapes) -> dict[str, Any]:
    if "image_proj.proj.weight" in shapes:
        return {"kind": "plain", "image_channels": shapes["image_proj.proj.weight"][1]}
    if "image_proj.proj.3.weight" in shapes:
        return {"kind": "full", "image_channels": shapes["image_proj.proj.0.weight"][1]}
    _, tokens, width = shapes["image_proj.latents"]
    return {
        "kind": "plus",
        "image_channels": shapes["image_proj.proj_in.weight"][1],
        "tokens": tokens,
        "width": width,
        "inner": shapes["image_proj.layers.0.0.to_q.weight"][0],
        "depth": len({match[1] for name in shapes if (match := LAYERS.match(name))}),
    }
