"""A module as compiled programs take it: a static graph, and its parameters by the names that they have in checkpoints.

One flat dict a module: files, LoRAs, sharding rules and the optimiser's masks all know parameters by these names, and a
program takes any pytree. Arrays have the layouts of Flax, so that nothing is transposed.
"""

import hashlib
import io
import pickle
from collections.abc import Mapping
from functools import cached_property
from types import FunctionType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from sdjax.checkpoints.folder import torch_name, variables
from sdjax.checkpoints.variables import get_value, set_value
from sdjax.runtime.parallel import Rules, sharding

Params = Mapping[str, Array]
"""Parameters by name, in the layouts of Flax"""

PACKAGES = ("sdjax", "flax", "jax", "jaxlib", "numpy", "ml_dtypes", "builtins", "collections", "functools")
"""Whose functions and classes a name stands for in a digest; of all others the code may have changed"""


class Graph:
    """The static part of a module, hashed once: hashing the graph definition of a UNet outlasts a denoising step."""

    def __init__(self, module: nnx.Module):
        self._graphdef, state = nnx.split(module)
        self._paths = {torch_name(path): path for path, _ in nnx.to_flat_state(state)}
        self._treedef = jax.tree.structure(state)
        self._hash = hash((self._graphdef, self._treedef))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Graph) or self._hash != other._hash:
            return False
        return self._graphdef == other._graphdef and self._treedef == other._treedef

    @cached_property
    def digest(self) -> str:
        """The same in every process for equal graphs, under one version of the packages that they name.

        Raises ValueError for a module with a part that has no name or is of another package.
        """
        file = io.BytesIO()
        try:
            _Named(file).dump(self._graphdef)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(f"a module that cannot be described in a file: {error}") from error
        return hashlib.sha256(file.getvalue()).hexdigest()

    def merge(self, params: Params) -> nnx.Module:
        """The module with these parameters. Raises ValueError that lists names which it lacks or does not know."""
        if wrong := sorted(self._paths.keys() ^ params.keys()):
            raise ValueError(f"parameters that are missing or unknown: {', '.join(wrong)}")
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, [params[name] for name in self._paths]))


class _Named(pickle.Pickler):
    """Writes classes and functions by their names, those of PACKAGES alone."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, type | FunctionType) and value.__module__.partition(".")[0] not in PACKAGES:
            raise pickle.PicklingError(f"{value.__module__}.{value.__qualname__}")
        return NotImplemented


def in_float32(module: nnx.Module) -> nnx.Module:
    """A copy that has its parameters in float32 and computes in float32."""
    copy = nnx.clone(module)
    for variable in variables(copy).values():
        set_value(variable, get_value(variable).astype(jnp.float32))
    for _, part in nnx.iter_graph(copy):
        if isinstance(part, nnx.Module) and getattr(part, "dtype", None) is not None:
            part.dtype = jnp.float32
    return copy


class Network:
    """A module on a mesh: `graph` and `params()`. rules: how parameters are split; all others are on every device.

    It follows the module: a parameter that is set to another value is moved to the devices at the next `params()`.
    """

    def __init__(self, module: nnx.Module, mesh: Mesh, rules: Rules = ()):
        self.module = module
        self.graph = Graph(module)
        self._variables = variables(module)
        self._shardings = {name: sharding(name, mesh, rules) for name in self._variables}
        self._params: dict[str, Array] = {}

    def params(self) -> dict[str, Array]:
        """The parameters, on the devices of the mesh."""
        values = {name: get_value(variable) for name, variable in self._variables.items()}
        if any(value is not self._params.get(name) for name, value in values.items()):
            self._params = jax.device_put(values, self._shardings)
            for name, value in self._params.items():
                set_value(self._variables[name], value)
        return self._params
