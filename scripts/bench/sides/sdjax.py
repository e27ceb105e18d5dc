"""sdjax's side."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from stages import NETWORKS, Stage

import sdjax
from sdjax.components import load_model
from sdjax.runtime.network import Network
from sides import Layouts, Side

CALLS: dict[str, Callable[..., jax.Array]] = {
    "text_encoder": lambda m, ids: m(ids),
    "unet": lambda m, latents, timestep, states, **added: m(
        latents, jnp.full(len(latents), timestep, jnp.float32), states, **added
    ),
    "vae": lambda m, latents: m.decode(latents),
    "vae_encode": lambda m, image: m.encode(image).mean,
}


class Sdjax(Side):
    """The pipeline on the first device."""

    def __init__(self, dtype: str, device: str):
        super().__init__(dtype, device)
        self.versions = {module.__name__: module.__version__ for module in (sdjax, jax, flax)}
        self._device, self._dtype = jax.devices()[0], dtype
        self.device_name = None if device == "cpu" else self._device.device_kind
        jnp.zeros(1).block_until_ready()  # the backend's own memory is not that of the weights

    def load(self, folder: Path, component: str | None) -> int:
        if component:
            self._models = {component: load_model(component, folder / component, dtype=self._dtype)}
        else:
            mesh = sdjax.runtime.parallel.data_mesh([self._device])
            self.pipe = sdjax.StableDiffusionPipeline.from_pretrained(folder, self._dtype, mesh=mesh)
            self.pipe.set_progress_bar_config(disable=True)
            self._models = {name: getattr(self.pipe, name) for name in self.pipe.params}  # which moves them there
        return sum(leaf.size for leaf in jax.block_until_ready(jax.tree.leaves(self._states())))

    def _states(self) -> list[nnx.State]:
        return [nnx.state(model) for model in self._models.values()]

    def prepare(self, stage: Stage, arrays: dict[str, np.ndarray], layouts: Layouts) -> Callable[[], Any]:
        if stage.what == "picture":
            return lambda: self.picture(stage, **arrays)
        if stage.what == "matmul":
            inputs = [jnp.asarray(x, self._dtype) for x in arrays.values()]
            product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(a.dtype))
            return lambda: product(*inputs).block_until_ready()
        model, arrays = self._models[NETWORKS[stage.what]], {name: jnp.asarray(a) for name, a in arrays.items()}
        own = Network(model, sdjax.runtime.parallel.data_mesh([self._device]))
        graph, params = own.graph, own.params()
        network = jax.jit(lambda params, arrays: CALLS[stage.what](graph.merge(params), **arrays))
        return lambda: network(params, arrays).block_until_ready()

    def peak(self) -> int | None:
        """Since the start of the process: JAX cannot begin again."""
        return self._device.memory_stats()["peak_bytes_in_use"] if self.device_name else None
