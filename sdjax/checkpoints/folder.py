"""The diffusers folder layout: JSON configs and safetensors with PyTorch's names and shapes."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import save_file

from sdjax.checkpoints import casting, memory
from sdjax.checkpoints.content import check_regular
from sdjax.checkpoints.errors import CheckpointError
from sdjax.checkpoints.variables import get_value, set_value
from sdjax.fields import brief
from sdjax.files import replacing

T = TypeVar("T", bound=np.ndarray | jax.Array)

LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
TABLE = "embedding.weight"
"""What names of [rows width] parameters end in; all other weights of two axes are kernels"""
TO_FLAX = {4: (2, 3, 1, 0), 2: (1, 0)}  # OIHW -> HWIO, [out in] -> [in out]
TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}
LARGEST_TEXT = 16 << 20  # bytes; of CLIP's tokenizer.json there are 2 million
PROBLEMS = ("unknown", "misshapen", "more than once", "not finite (NaN or infinity)", "too large", "missing")


def read_text(path: Path, errors: str = "strict") -> str:
    """The text of a file of a checkpoint, UTF-8. Raises CheckpointError naming the file for one too large to be any."""
    check_regular(path)
    with open(path, "rb") as file:
        content = file.read(LARGEST_TEXT + 1)
    if len(content) > LARGEST_TEXT:
        raise CheckpointError(f"{path}: larger than {LARGEST_TEXT >> 20} MiB, which no such file of a checkpoint is")
    try:
        return content.decode(errors=errors)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not text in UTF-8: {error.reason} at byte {error.start}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError naming the file when it is missing or is none."""
    try:
        value = json.loads(read_text(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: not a checkpoint folder: it has no {path.name}") from None
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


def indexed(path: Path, index: Mapping[str, Any], name: str) -> str | None:
    """The class that model_index.json of a folder names for a component, without the prefix Flax. It decides, as in
    PyTorch. Raises CheckpointError for an entry that is no library and class."""
    match index.get(name) or [None, None]:
        case [str() | None, str() | None as class_name]:
            return class_name and class_name.removeprefix("Flax")
    raise CheckpointError(f"{path / 'model_index.json'}: {name}: {brief(index[name])} is no library and class")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes JSON, whole or not at all. Raises ValueError that names the file for a number that JSON does not have."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise ValueError(f"{path}: cannot be written: {error}") from error
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path, module: nnx.Module) -> None:
    """Writes all parameters of a module as safetensors, with PyTorch's names and shapes, whole or not at all."""
    values = {name: np.asarray(get_value(variable)) for name, variable in variables(module).items()}
    write_arrays(path, {name: torch_layout(name, value) for name, value in values.items()})


def write_arrays(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes arrays by name as safetensors, with metadata in the header, whole or not at all."""
    whole = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    try:
        with replacing(path) as temporary:
            save_file(whole, temporary, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written: {error}") from error


def torch_name(keys: tuple) -> str:
    """('conv_in', 'kernel') -> 'conv_in.weight'"""
    *parents, leaf = map(str, keys)
    return ".".join((*parents, LEAF_NAMES.get(leaf, leaf)))


def variables(module: nnx.Module) -> dict[str, nnx.Variable]:
    """The parameters of a module by the names that they have in checkpoints."""
    return {torch_name(keys): variable for keys, variable in nnx.to_flat_state(nnx.state(module))}


def torch_layout(name: str, array: T) -> T:
    """A parameter in PyTorch's layout: kernels HWIO -> OIHW, [in out] -> [out in]; others, which are the same.

    A view, for arrays of NumPy.
    """
    return _permuted(name, array, TO_TORCH)


def flax_layout(name: str, array: T) -> T:
    """What `torch_layout` gives, as it was."""
    return _permuted(name, array, TO_FLAX)


def _permuted(name: str, array: T, axes: dict[int, tuple[int, ...]]) -> T:
    is_kernel = array.ndim == 4 or (array.ndim == 2 and name.endswith(".weight") and not name.endswith(TABLE))
    return array.transpose(axes[array.ndim]) if is_kernel else array


def torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in PyTorch's layout of a parameter of this shape."""
    return torch_layout(name, np.broadcast_to(0, shape)).shape


def fill(
    module: nnx.Module,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    source: str,
    renames: Iterable[tuple[str, str]] = (),
    ignored: str | None = None,
    keep_dtypes: bool = False,
) -> None:
    """Gives every parameter of an abstract module (nnx.eval_shape) its tensor, cast to the parameter's dtype.

    keep_dtypes: floating-point tensors are not cast. Raises one CheckpointError that lists every unknown, misshapen,
    repeated, non-finite and missing tensor.
    """
    leaves = variables(module)
    problems: dict[str, list[str]] = {kind: [] for kind in PROBLEMS}
    found: set[str] = set()

    def fitting() -> Iterator[tuple[str, str, np.ndarray, np.dtype]]:
        for given, array in tensors:
            name = _renamed(given, renames)
            if name not in leaves:
                if not (ignored and re.search(ignored, name)):
                    problems["unknown"].append(f"{given} {list(array.shape)}")
                continue
            leaf, value = leaves[name], flax_layout(name, array)
            if name in found:
                problems["more than once"].append(given)
            elif value.shape == leaf.shape:
                yield name, given, value, value.dtype if keep_dtypes and is_floating(value.dtype) else leaf.dtype
            else:
                expected = list(torch_shape(name, leaf.shape))
                problems["misshapen"].append(f"{given} {list(array.shape)} instead of {expected}")
            found.add(name)

    for name, given, value in casting.in_parallel(_cast, fitting()):
        if isinstance(value, str):
            problems[value].append(given if value != "too large" else f"{given} for {leaves[name].dtype}")
        else:
            set_value(leaves[name], jax.device_put(value).block_until_ready())
    problems["missing"] = [
        f"{name} {list(torch_shape(name, leaf.shape))}" for name, leaf in leaves.items() if name not in found
    ]
    lines = [f"{kind}: {what}" for kind, all_of_it in problems.items() for what in all_of_it]
    if lines:
        raise CheckpointError(f"{source}: {len(lines)} tensors do not fit:\n  " + "\n  ".join(lines))


def _cast(name: str, given: str, array: np.ndarray, dtype: np.dtype) -> tuple[str, str, np.ndarray | str]:
    value = casting.cast(array, dtype)
    if value is None:
        value = "too large" if casting.is_finite(array) else "not finite (NaN or infinity)"
    memory.release(array)
    return name, given, value


def is_floating(dtype: np.dtype) -> bool:
    """Whether these are floating-point numbers, those of ml_dtypes included."""
    return jnp.issubdtype(dtype, jnp.floating)


def _renamed(name: str, renames: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name
