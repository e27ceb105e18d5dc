"""Flax's weight files, which diffusers wrote up to 0.35: a msgpack tree with Flax's names and layouts of parameters."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.checkpoints import memory
from sdjax.checkpoints.errors import CheckpointError
from sdjax.checkpoints.folder import torch_layout, torch_name

NUMBERED = re.compile(r"(?<!linear)_(\d+)$")  # resnets_0 is PyTorch's resnets.0, but linear_1 is linear_1


def open_tensors(path: Path) -> Mapping[str, np.ndarray]:
    """PyTorch name -> array in PyTorch's layout, for every parameter of the tree.

    Raises CheckpointError naming the file when it is truncated or none of Flax's.
    """
    from flax import serialization

    try:
        tree = serialization.msgpack_restore(memory.mapped(path))
        named = ((torch_name(keys), array) for keys, array in _leaves(tree))
        return {name: torch_layout(name, array) for name, array in named}
    except Exception as error:  # msgpack has its own kinds, others come from a tree of something else
        raise CheckpointError(f"{path}: truncated, or no weights saved by Flax: {error}") from error


def _leaves(tree: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    for name, value in tree.items():
        key = NUMBERED.sub(r".\1", name)
        if isinstance(value, Mapping):
            yield from (((key, *keys), array) for keys, array in _leaves(value))
        elif isinstance(value, np.ndarray):
            yield (key,), value
        else:
            raise ValueError(f"{name} is a {type(value).__name__}")
