"""Low-rank adaptation (arXiv:2106.09685) of the models of a pipeline: its changes are merged into their weights."""

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from flax import nnx

from sdjax.checkpoints.folder import TO_FLAX, TO_TORCH, torch_name
from sdjax.checkpoints.lora import Layers, LoraLayer

Weight = tuple[str, str]
"""(component, parameter)"""


class Loras:
    """The LoRAs of some models, each with a weight w: W = W_0 + sum_i w_i s_i up_i down_i

    The sum is taken in float32 on the host and cast once to the dtype of the parameter; a parameter that no weight
    touches has its first value W_0, bit for bit. Programs take parameters as arguments, so nothing is compiled.
    The first values of the parameters that were ever changed stay on the host until `clear`.

    It changes the modules that it was made with, and takes their values at the first change for W_0: `clear` it before
    other values are set, and make another one for another module.
    """

    def __init__(self, models: Mapping[str, nnx.Module]):
        self.models = dict(models)
        self._variables = {
            (component, torch_name(keys)): variable
            for component, model in models.items()
            for keys, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
            if keys[-1] == "kernel"
        }
        self._layers: dict[str, Layers] = {}
        self._weights: dict[str, float] = {}
        self._base: dict[Weight, np.ndarray] = {}
        self._merged: dict[Weight, dict[str, float]] = {}

    @property
    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """{component: {parameter: shape in PyTorch's layout}} of every weight that a LoRA can change."""
        shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        for (component, parameter), variable in self._variables.items():
            shape = variable.get_value().shape
            shapes.setdefault(component, {})[parameter] = tuple(shape[axis] for axis in TO_TORCH[len(shape)])
        return shapes

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every loaded LoRA; 0 where it is not set."""
        return {name: self._weights.get(name, 0.0) for name in self._layers}

    def add(self, name: str, layers: Layers, weight: float = 0.0) -> None:
        """Adds a LoRA that `sdjax.checkpoints.lora.read` read for `shapes`, with this weight, to those that are set.

        Raises ValueError if there is one of this name, or for a weight that is not finite.
        """
        if name in self._layers:
            raise ValueError(f"a LoRA {name!r} is loaded already")
        _check(name, weight)
        self._layers[name] = layers
        self.set({**self.weights, name: weight})

    def set(self, weights: Mapping[str, float]) -> None:
        """Gives LoRAs these weights, of any sign, and all others weight 0.

        Raises ValueError for a LoRA that is not loaded and for a weight that is not finite, before anything is changed.
        """
        unknown = [name for name in weights if name not in self._layers]
        if unknown:
            loaded = ", ".join(self._layers) or "none"
            raise ValueError(f"no LoRA {', '.join(map(repr, unknown))} is loaded; loaded: {loaded}")
        for name, weight in weights.items():
            _check(name, weight)
        self._weights = {name: float(weight) for name, weight in weights.items() if weight}
        wanted: dict[Weight, dict[str, float]] = {key: {} for key in self._merged}
        for name, weight in self._weights.items():
            for component, layers in self._layers[name].items():
                for parameter in layers:
                    wanted.setdefault((component, parameter), {})[name] = weight
        changed = [key for key, weights in wanted.items() if self._merged.get(key) != weights]
        with ThreadPoolExecutor() as pool:
            for key, value in zip(changed, pool.map(self._value, changed, map(wanted.get, changed)), strict=True):
                self._variables[key].set_value(value)
                self._merged[key] = wanted[key]

    def clear(self) -> None:
        """Restores every parameter and forgets all LoRAs."""
        self.set({})
        for state in (self._layers, self._base, self._merged):
            state.clear()

    def _value(self, key: Weight, weights: Mapping[str, float]) -> np.ndarray:
        """The parameter with LoRAs of these weights."""
        component, parameter = key
        if key not in self._base:
            self._base[key] = np.asarray(self._variables[key].get_value())
        base = self._base[key]
        if not weights:
            return base
        value = change([(weight, self._layers[name][component][parameter]) for name, weight in weights.items()])
        value += base
        return value.astype(base.dtype, copy=False)


def _check(name: str, weight: float) -> None:
    if not math.isfinite(weight):
        raise ValueError(f"the weight of LoRA {name!r} must be a finite number, not {weight}")


def change(weighted: list[tuple[float, LoraLayer]]) -> np.ndarray:
    """sum_i w_i s_i up_i down_i as one product of the stacked factors: [in out] or [kh kw in out], float32."""
    downs = [weight * layer.scale * layer.down.astype(np.float32) for weight, layer in weighted]
    ups = [layer.up.astype(np.float32) for _, layer in weighted]
    down = np.concatenate(downs)
    return down.transpose(TO_FLAX[down.ndim]) @ np.concatenate(ups, axis=1).T
