"""The device mesh, mapping over it, padding and trimming.

The batch is split over one axis, `data`; weights are on every device. A mapped function runs on each device for itself:
the compiled program contains no collective. Weights can also be split, by rules: a program gathers those that it takes.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA = PartitionSpec("data")
ROWS = PartitionSpec(None, "data")
REPLICATED = PartitionSpec()

Rules = Sequence[tuple[str, PartitionSpec]]
"""(regular expression, how parameters are split in whose name it is found)"""


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of one axis, `data`, over these devices; None: all devices of this process."""
    return Mesh(np.array(devices or jax.local_devices()), ("data",))


def shard_map(f: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """f on each device's share of the batch."""
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def sharding(name: str, mesh: Mesh, rules: Rules) -> NamedSharding:
    """That of a parameter: by the first rule that fits its name; replicated where none does."""
    return NamedSharding(mesh, next((spec for pattern, spec in rules if re.search(pattern, name)), REPLICATED))


def padded_size(images: int, devices: int) -> int:
    """The batch that is computed for so many images: a power of two on each device, so that few sizes are compiled."""
    per_device = -(-images // devices)
    return devices * 2 ** (per_device - 1).bit_length()


def split(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """Puts each device's share of a batch on it."""
    return jax.device_put(array, NamedSharding(mesh, DATA))


def pad(array: np.ndarray, size: int) -> np.ndarray:
    """Repeats the last image until there are `size`."""
    return np.concatenate([array, np.repeat(array[-1:], size - len(array), axis=0)])
