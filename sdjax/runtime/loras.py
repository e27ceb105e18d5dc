"""Low-rank adaptation (arXiv:2106.09685) of the models of a pipeline: its changes are merged into their weights."""

import math
from collections.abc import Mapping

import numpy as np
from flax import nnx

from sdjax.checkpoints import casting
from sdjax.checkpoints.folder import torch_shape, variables
from sdjax.checkpoints.lora import Layers
from sdjax.checkpoints.variables import get_value, set_value
from sdjax.runtime.adapted import summed

Weight = tuple[str, str]
"""(component, parameter)"""


class Loras:
    """The LoRAs of some models, each with a weight: parameters are `runtime.adapted.adapted` of their first values W_0.

    They are computed on the host, once; a parameter that no weight touches has its first value, bit for bit. Programs
    take parameters as arguments, so nothing is compiled. The first values of the parameters that were ever changed stay
    on the host until `clear`.

    It changes the modules that it was made with, and takes their values at the first change for W_0: `clear` it before
    other values are set, and make another one for another module.
    """

    def __init__(self, models: Mapping[str, nnx.Module]):
        self.models = dict(models)
        self._variables = {
            (component, parameter): variable
            for component, model in models.items()
            for parameter, variable in variables(model).items()
        }
        self.layers: dict[str, Layers] = {}
        """of every loaded LoRA"""
        self._weights: dict[str, float] = {}
        self._base: dict[Weight, np.ndarray] = {}
        self._merged: dict[Weight, dict[str, float]] = {}

    @property
    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """{component: {parameter: shape in PyTorch's layout}} of every parameter that a LoRA can change."""
        shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        for (component, parameter), variable in self._variables.items():
            shapes.setdefault(component, {})[parameter] = torch_shape(parameter, variable.shape)
        return shapes

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every loaded LoRA; 0 where it is not set."""
        return {name: self._weights.get(name, 0.0) for name in self.layers}

    def add(self, name: str, layers: Layers, weight: float = 0.0) -> None:
        """Adds a LoRA that `sdjax.checkpoints.lora.read` read for `shapes`, with this weight, to those that are set.

        Raises ValueError, and changes nothing, if there is one of this name, and as `set` does.
        """
        if name in self.layers:
            raise ValueError(f"a LoRA {name!r} is loaded already; give this one another name=")
        self.layers[name] = layers
        try:
            self.set({**self.weights, name: weight})
        except ValueError:
            del self.layers[name]
            raise

    def set(self, weights: Mapping[str, float]) -> None:
        """Gives LoRAs these weights, of any sign, and all others weight 0.

        Raises ValueError, and changes nothing, for a LoRA that is not loaded, for a weight that is not finite and where
        the values would not be finite in the dtype of a parameter.
        """
        unknown = [name for name in weights if name not in self.layers]
        if unknown:
            loaded = ", ".join(self.layers) or "none"
            raise ValueError(f"no LoRA {', '.join(map(repr, unknown))} is loaded; loaded: {loaded}")
        for name, weight in weights.items():
            if not math.isfinite(weight):
                raise ValueError(f"the weight of LoRA {name!r} must be a finite number, not {weight}")
        weights = {name: float(weight) for name, weight in weights.items() if weight}
        try:
            self._merge(weights)
        except ValueError:
            self._merge(self._weights)
            raise
        self._weights = weights

    def remove(self, name: str) -> None:
        """Forgets a LoRA, if it is there."""
        if name in self.layers:
            self.set({other: weight for other, weight in self.weights.items() if other != name})
            del self.layers[name]

    def clear(self) -> None:
        """Restores every parameter and forgets all LoRAs."""
        self.set({})
        for state in (self.layers, self._base, self._merged):
            state.clear()

    def _merge(self, weights: Mapping[str, float]) -> None:
        """Sets the parameters for which these weights are others than they have, a few at a time in memory."""
        wanted: dict[Weight, dict[str, float]] = {key: {} for key in self._merged}
        for name, weight in weights.items():
            for component, layers in self.layers[name].items():
                for parameter in layers:
                    wanted.setdefault((component, parameter), {})[name] = weight
        changed = ((key, weights) for key, weights in wanted.items() if self._merged.get(key) != weights)
        for key, value in casting.in_parallel(self._value, changed):
            set_value(self._variables[key], value)
            self._merged[key] = wanted[key]

    def _value(self, key: Weight, weights: Mapping[str, float]) -> tuple[Weight, np.ndarray]:
        """The parameter with LoRAs of these weights. Raises ValueError where it is not finite."""
        component, parameter = key
        if key not in self._base:
            self._base[key] = np.asarray(get_value(self._variables[key]))
        base = self._base[key]
        if not weights:
            return key, base
        with np.errstate(over="ignore", invalid="ignore"):  # the result is checked for them
            changes = [(weight, self.layers[name][component][parameter]) for name, weight in weights.items()]
            try:
                value = casting.cast(summed(parameter, base, changes), base.dtype)
            except np.linalg.LinAlgError:  # a rotation that overflowed
                value = None
        if value is None:
            names = ", ".join(f"{name!r} with weight {weight:g}" for name, weight in weights.items())
            raise ValueError(
                f"{component}: {parameter} is not finite in {base.dtype} with LoRA {names}: "
                "give a smaller weight or load the model with another dtype"
            )
        return key, value
