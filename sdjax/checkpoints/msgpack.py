"""Flax's weight files, which diffusers wrote up to 0.35: a msgpack tree with Flax's names and layouts of parameters."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sdjax.checkpoints import memory
from sdjax.checkpoints.errors import CheckpointError
from sdjax.checkpoints.folder import torch_layout, torch_name
from sdjax.fields import brief

NUMBERED = re.compile(r"(?<!linear)_(\d+)$")  # resnets_0 is PyTorch's resnets.0, but linear_1 is linear_1
ARRAY = 1  # Flax's code of an array: (shape, dtype, bytes)
CHUNKED = "__msgpack_chunked_array__"
DTYPES = {
    **{name: np.dtype(name) for name in ("float16", "float32", "float64", "int8", "int32", "int64", "uint8", "bool")},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
MOST_CHILDREN, MOST_ENTRIES = 1000, 100_000  # of a node, of a tree


def open_tensors(path: Path) -> dict[str, np.ndarray]:
    """PyTorch name -> array in PyTorch's layout, for every parameter of the tree.

    Raises CheckpointError naming the file when it is truncated or none of Flax's.
    """
    import msgpack

    entries = 0

    def node(pairs: list[tuple[str, Any]]) -> Any:
        nonlocal entries
        entries += len(pairs)
        if entries > MOST_ENTRIES:
            raise ValueError(f"a tree of more than {MOST_ENTRIES:,} entries")
        own = dict(pairs)
        if CHUNKED not in own:
            return own
        chunks = [own["chunks"][str(i)] for i in range(len(own["chunks"]))]
        return np.concatenate(chunks).reshape([own["shape"][str(i)] for i in range(len(own["shape"]))])

    def array(code: int, data: bytes) -> np.ndarray:
        if code != ARRAY:
            raise ValueError(f"a value of Flax's kind {code}")
        shape, name, content = msgpack.unpackb(data, raw=True, max_array_len=32, max_map_len=0)
        return np.frombuffer(content, DTYPES[name.decode()]).reshape(shape)

    try:
        limits = {"max_array_len": 0, "max_map_len": MOST_CHILDREN}
        tree = msgpack.unpackb(memory.mapped(path), ext_hook=array, object_pairs_hook=node, **limits)
        named = ((torch_name(keys), array) for keys, array in _leaves(tree))
        return {name: torch_layout(name, array) for name, array in named}
    except OSError:
        raise
    except Exception as error:  # msgpack has its own kinds, others come from a tree of something else
        raise CheckpointError(f"{path}: truncated, or no weights saved by Flax: {brief(str(error))}") from error


def _leaves(tree: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    for name, value in tree.items():
        key = NUMBERED.sub(r".\1", name)
        if isinstance(value, dict):
            yield from (((key, *keys), array) for keys, array in _leaves(value))
        elif isinstance(value, np.ndarray):
            yield (key,), value
        else:
            raise ValueError(f"{brief(name)} is a {type(value).__name__}")
