"""The deleted Flax UNet's side of `bench.py`: diffusers 0.35 in an environment of its own, without PyTorch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import flax
import jax
import jax.numpy as jnp
import numpy as np
from bench_stages import TIMESTEP, Stage, config
from diffusers import FlaxUNet2DConditionModel
from diffusers.models.modeling_flax_pytorch_utils import rename_key, rename_key_and_reshape_tensor
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file


class Flax:
    """The UNet alone, see `bench_side.Side`."""

    def __init__(self, folder: Path, dtype: str):
        self.versions = {module.__name__: module.__version__ for module in (diffusers, flax, jax)}
        self.device_name = None
        self._unet = FlaxUNet2DConditionModel.from_config(config(folder, "unet"), dtype=getattr(jnp, dtype))
        shapes = flatten_dict(jax.eval_shape(self._unet.init_weights, jax.random.PRNGKey(0)))
        params = {}
        for name, tensor in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
            path, value = rename_key_and_reshape_tensor(tuple(rename_key(name).split(".")), tensor, shapes)
            params[path] = jnp.asarray(value, dtype)
        if {path: value.shape for path, value in params.items()} != {path: leaf.shape for path, leaf in shapes.items()}:
            raise ValueError(f"{folder}: the weights do not fit diffusers' Flax UNet")
        self._params = unflatten_dict(params)

    def prepare(self, stage: Stage, arrays: dict[str, np.ndarray], layouts: Any) -> Callable[[], Any]:
        latents, states = jnp.asarray(arrays["latents"].transpose(0, 3, 1, 2)), jnp.asarray(arrays["states"])
        timesteps = jnp.full(stage.batch, TIMESTEP, jnp.float32)

        @jax.jit
        def unet(params: Any, *args: jax.Array) -> jax.Array:
            return self._unet.apply({"params": params}, *args, return_dict=False)[0]

        return lambda: jax.block_until_ready(unet(self._params, latents, timesteps, states))

    def array(self, result: jax.Array) -> np.ndarray:
        return np.asarray(result, np.float32).transpose(0, 2, 3, 1)

    def layouts(self, stage: Stage) -> dict[str, Any]:
        return {}

    def flops(self, stage: Stage) -> None:
        return None

    def device_peak(self, *, reset: bool) -> None:
        return None


def load(name: str, folder: Path, dtype: str, device: str) -> Flax:
    """The side of this name."""
    return Flax(folder, dtype)
