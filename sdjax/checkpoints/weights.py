"""Weight files as names and arrays, in every format: safetensors, PyTorch's pickles, Flax's msgpack."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sdjax.checkpoints import file_names, memory, msgpack, pickles
from sdjax.checkpoints.content import LONGEST_HEADER, format_of
from sdjax.checkpoints.errors import CheckpointError
from sdjax.checkpoints.folder import read_json
from sdjax.fields import brief

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
"""As safetensors spells them."""
METADATA = "__metadata__"
MOST_TENSORS, LONGEST_NAME = 20_000, 250  # SDXL has 2,515, their longest name 111 characters


def read_safetensors(path: Path) -> Mapping[str, np.ndarray]:
    """The tensors of a safetensors file as read-only views of it, in the order of their bytes.

    The length of the header (8 bytes), the header (JSON: name -> dtype, shape, first and last byte), the bytes.
    Raises CheckpointError naming the file.
    """
    try:
        data, header = _header(path)
        header.pop(METADATA, None)
        entries = sorted(header.items(), key=lambda entry: entry[1]["data_offsets"])
        if sum(end - start for _, entry in entries for start, end in [entry["data_offsets"]]) > data.size:
            raise ValueError("its tensors overlap or go past its end")
        return {name: _view(data, **entry) for name, entry in entries}
    except OSError:
        raise
    except Exception as error:  # whatever a header that is none leads to
        raise CheckpointError(f"{path}: truncated or no safetensors file: {error}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata in a safetensors file's header; empty for a file of another format.

    Raises CheckpointError naming the file where these are not texts by name.
    """
    if format_of(path) != "safetensors":
        return {}
    try:
        metadata = _header(path)[1].get(METADATA) or {}
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: truncated or no safetensors file: {error}") from error
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise CheckpointError(f"{path}: no safetensors file: {METADATA} in its header is not texts by name")
    return metadata


def _header(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The bytes after the header, and the header."""
    data = memory.mapped(path)
    start = 8 + int(memory.part(data, 0, np.dtype("<u8"), 1)[0])
    if start > LONGEST_HEADER:
        raise ValueError(f"a header of {start - 8} bytes")
    return data[start:], json.loads(memory.part(data, 8, np.dtype(np.uint8), start - 8).tobytes())


def _view(data: np.ndarray, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    kind, (start, end), elements = np.dtype(DTYPES[dtype]), data_offsets, math.prod(shape)
    if end - start != elements * kind.itemsize or min(shape, default=0) < 0:
        raise ValueError(f"{brief(end - start)} bytes for {dtype} {brief(shape)}")
    return memory.part(data, start, kind, elements).reshape(shape)


TRAINED = ("state_dict", "params_ema", "params")


def read_pickle(path: Path) -> Mapping[str, np.ndarray]:
    """The tensors of a state dict, or of the one that is called as one of TRAINED in what a trainer saved.

    Raises CheckpointError naming the file.
    """
    value = pickles.load(path)
    for name in TRAINED:
        if isinstance(value, Mapping) and isinstance(value.get(name), Mapping):
            value = value[name]
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, no tensors by name")
    return {name: array for name, array in value.items() if isinstance(name, str) and isinstance(array, np.ndarray)}


READERS: dict[str, Callable[[Path], Mapping[str, np.ndarray]]] = {
    "safetensors": read_safetensors,
    "msgpack": msgpack.open_tensors,
    "pickle": read_pickle,
}
"""By the result of `format_of`"""


def open_tensors(path: Path) -> Mapping[str, np.ndarray]:
    """name -> array for one weight file, in PyTorch's names and layout (Flax's are translated).

    The format is that of its content, whatever the file is called.
    Safetensors and pickles are views of the mapped file: a tensor is read from the disk where it is accessed.
    Tensors without elements are left out, but for those of shape [0], which mark something. Raises CheckpointError
    naming the file when it is truncated, of another kind, or would run code, and for more tensors or longer names than
    any model has.
    """
    tensors = {
        name: array for name, array in READERS[format_of(path)](path).items() if array.size or not any(array.shape)
    }
    longest = max(map(len, tensors), default=0)
    if len(tensors) > MOST_TENSORS or longest > LONGEST_NAME:
        raise CheckpointError(
            f"{path}: no Stable Diffusion model: {len(tensors):,} tensors, names of up to {longest:,} characters"
        )
    return tensors


def read_tensors(folder: Path, stem: str, variant: str | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) for every tensor of a model, shard by shard: of the variant if the folder has it, else of none.

    stem: a key of `file_names.FILES`. Raises CheckpointError naming the file when it is unreadable, when a shard is
    missing or lacks a tensor that the index promises; naming the variants there are when there is no file.
    """
    names = {path.name for path in folder.iterdir()}
    chosen = file_names.choose(names, stem, variant)
    if chosen is None:
        others = "".join(f", but variant={other!r}" for other in file_names.variants(names, stem))
        raise CheckpointError(f"{folder}: has no {', '.join(file_names.FILES[stem])}{others}")
    for file, promised in _shards(folder / chosen) if chosen.endswith(".json") else [(folder / chosen, ())]:
        tensors = open_tensors(file)
        if lacking := [name for name in promised if name not in tensors]:
            raise CheckpointError(f"{file}: lacks what {chosen} lists: {', '.join(lacking)}")
        yield from tensors.items()


def _shards(index: Path) -> Iterator[tuple[Path, list[str]]]:
    """(shard, the tensors that are in it)"""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise CheckpointError(f"{index}: no index of shards: it has no weight_map")
    shards: dict[Path, list[str]] = {}
    for name, shard in places.items():
        path = index.parent / Path(shard).name  # never outside the folder
        if path not in shards and not path.is_file():
            raise CheckpointError(f"{index.parent}: has no {shard[:LONGEST_NAME]}, which {index.name} names")
        shards.setdefault(path, []).append(name)
    yield from shards.items()
