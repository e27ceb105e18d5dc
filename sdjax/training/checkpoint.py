"""The state of a run on disk: written whole or not at all."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.files import replacing


def save(path: Path, tree: Any) -> None:
    """Writes every leaf of a tree of arrays under its path in the tree, then puts the file in place in one move."""
    leaves = {name: np.asarray(leaf) for name, leaf in _named(tree).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "wb") as file:  # np.savez would add .npz to a bare name
        np.savez(file, **leaves)


def restore(path: Path, like: Any, part: str = "") -> Any:
    """The tree that `save` wrote, with the structure, types and sharding of `like` (arrays, or their shapes alone).

    part: the path in the tree of the part that is wanted, as in `state.ema`.

    Raises:
        ValueError: the file's leaves are not those of `like`, by name or by shape.
    """
    with np.load(path) as file:
        prefix = part and f"{part}."
        saved = {name.removeprefix(prefix): file[name] for name in file if name.startswith(prefix)}
    named = _named(like)
    wrong = sorted(named.keys() ^ saved.keys())
    wrong += [name for name in named.keys() & saved.keys() if saved[name].shape != named[name].shape]
    if wrong:
        raise ValueError(f"{path} is of another model or optimiser: {wrong[:8]}; remove it to begin again")
    leaves = [_placed(saved[name].astype(leaf.dtype), leaf) for name, leaf in named.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by their path, as in `state.params.unet.conv_in.bias`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _placed(value: np.ndarray, like: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """On the devices of `like`, if that is bound to any."""
    return jax.device_put(value, like.sharding) if getattr(like, "committed", False) else jnp.asarray(value)
