"""The diffusers folder layout: JSON configs and safetensors with PyTorch's names and shapes."""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sdjax.checkpoints.errors import CheckpointError

LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
TO_FLAX = {4: (2, 3, 1, 0), 2: (1, 0)}  # OIHW -> HWIO, [out in] -> [in out]
TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError naming the file when it is missing or is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: not a checkpoint folder: it has no {path.name}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes JSON, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def write_whole(path: Path, write: Callable[[str], Any]) -> None:
    """Calls write(temporary file beside path), then moves that file to path: a reader never sees half of it.

    The file is on the disk before it has its name, so not even a power cut leaves half of it.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_tensors(folder: Path, stem: str) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) for every tensor of `<stem>.safetensors`, read one by one from a memory map.

    Raises CheckpointError naming the file when it is missing, truncated or otherwise unreadable.
    """
    path = folder / f"{stem}.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no {path.name}")
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no dict
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated or no safetensors file: {error}") from error


def write_tensors(path: Path, module: nnx.Module) -> None:
    """Writes all parameters of a module as safetensors, with PyTorch's names and shapes, whole or not at all."""
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    tensors = {
        torch_name(keys): np.ascontiguousarray(_permuted(keys, np.asarray(leaf[...]), TO_TORCH)) for keys, leaf in state
    }
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))


def torch_name(keys: tuple) -> str:
    """('conv_in', 'kernel') -> 'conv_in.weight'"""
    *parents, leaf = map(str, keys)
    return ".".join((*parents, LEAF_NAMES.get(leaf, leaf)))


def _permuted(keys: tuple, array: np.ndarray, permutations: dict[int, tuple[int, ...]]) -> np.ndarray:
    return array.transpose(permutations[array.ndim]) if keys[-1] == "kernel" else array


def _torch_shape(keys: tuple, shape: tuple[int, ...]) -> list[int]:
    return list(_permuted(keys, np.broadcast_to(0, shape), TO_TORCH).shape)


def fill(
    module: nnx.Module,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    source: str,
    renames: Iterable[tuple[str, str]] = (),
    ignored: str | None = None,
) -> None:
    """Gives every parameter of an abstract module (nnx.eval_shape) its tensor, cast to the parameter's dtype.

    Raises one CheckpointError that lists every unknown, missing, misshapen and non-finite tensor.
    """
    leaves = {torch_name(keys): (keys, leaf) for keys, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))}
    filled, problems = {}, []
    for given, array in tensors:
        name = _renamed(given, renames)
        if name not in leaves:
            if not (ignored and re.search(ignored, name)):
                problems.append(f"unknown: {given} {list(array.shape)}")
            continue
        keys, leaf = leaves[name]
        value = _permuted(keys, array, TO_FLAX) if array.ndim in TO_FLAX else array
        if value.shape != leaf.shape:
            problems.append(f"misshapen: {given} {list(array.shape)} instead of {_torch_shape(keys, leaf.shape)}")
        elif not np.isfinite(value).all():
            problems.append(f"not finite (NaN or infinity): {given}")
        else:
            leaf.set_value(jax.device_put(np.ascontiguousarray(value, dtype=leaf.dtype)))
        filled[name] = True
    missing = {name: leaf for name, leaf in leaves.items() if name not in filled}
    problems += [f"missing: {name} {_torch_shape(keys, leaf.shape)}" for name, (keys, leaf) in missing.items()]
    if problems:
        raise CheckpointError(f"{source}: {len(problems)} tensors do not fit:\n  " + "\n  ".join(problems))
    nnx.update(module, nnx.from_flat_state([leaves[name] for name in filled]))


def _renamed(name: str, renames: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name
