"""A module as compiled programs take it: a static graph and a flat list of parameters."""

import hashlib
import io
import pickle
from functools import cached_property
from types import FunctionType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding

from sdjax.runtime.parallel import REPLICATED

PACKAGES = ("sdjax", "flax", "jax", "jaxlib", "numpy", "ml_dtypes", "builtins", "collections", "functools")
"""Whose functions and classes a name stands for in a digest; of all others the code may have changed"""


class Graph:
    """The static part of a module, hashed once: hashing the graph definition of a UNet outlasts a denoising step."""

    def __init__(self, module: nnx.Module):
        self._graphdef, state = nnx.split(module)
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

    def merge(self, params: list[Array]) -> nnx.Module:
        """The module with these parameters."""
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, params))


class _Named(pickle.Pickler):
    """Writes classes and functions by their names, those of PACKAGES alone."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, type | FunctionType) and value.__module__.partition(".")[0] not in PACKAGES:
            raise pickle.PicklingError(f"{value.__module__}.{value.__qualname__}")
        return NotImplemented


def in_float32(module: nnx.Module) -> nnx.Module:
    """A copy that has its parameters in float32 and computes in float32."""
    copy = nnx.clone(module)
    for variable in jax.tree.leaves(nnx.state(copy, nnx.Param), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
        variable.set_value(variable.get_value().astype(jnp.float32))
    for _, part in nnx.iter_modules(copy):
        if getattr(part, "dtype", None) is not None:
            part.dtype = jnp.float32
    return copy


class Network:
    """A module on a mesh: `graph` and `params()`.

    It follows the module: a parameter that is set to another value is moved to the devices at the next `params()`.
    """

    def __init__(self, module: nnx.Module, mesh: Mesh):
        self.module = module
        self.graph = Graph(module)
        self._sharding = NamedSharding(mesh, REPLICATED)
        self._variables = jax.tree.leaves(nnx.state(module), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
        self._params: list[Array] = []

    def params(self) -> list[Array]:
        """The parameters, on every device of the mesh."""
        values = [variable.get_value() for variable in self._variables]
        if len(values) != len(self._params) or any(a is not b for a, b in zip(values, self._params, strict=True)):
            self._params = jax.device_put(values, self._sharding)
            for variable, value in zip(self._variables, self._params, strict=True):
                variable.set_value(value)
        return self._params
