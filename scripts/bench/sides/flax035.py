"""The UNet that diffusers deleted: diffusers 0.35 in an environment of its own, without PyTorch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import flax
import jax
import jax.numpy as jnp
import numpy as np
from diffusers import FlaxUNet2DConditionModel
from diffusers.models.modeling_flax_pytorch_utils import rename_key, rename_key_and_reshape_tensor
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file
from stages import Stage, config

from sides import Layouts, Side


class Flax(Side):
    """The UNet alone."""

    def __init__(self, dtype: str, device: str):
        super().__init__(dtype, device)
        self.versions = {module.__name__: module.__version__ for module in (diffusers, flax, jax)}
        self._dtype = dtype

    def load(self, folder: Path, component: str | None) -> int:
        self._unet = FlaxUNet2DConditionModel.from_config(config(folder, "unet"), dtype=getattr(jnp, self._dtype))
        shapes = flatten_dict(jax.eval_shape(self._unet.init_weights, jax.random.PRNGKey(0)))
        params = {}
        for name, tensor in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
            path, value = rename_key_and_reshape_tensor(tuple(rename_key(name).split(".")), tensor, shapes)
            params[path] = jnp.asarray(value, self._dtype)
        if {path: value.shape for path, value in params.items()} != {path: leaf.shape for path, leaf in shapes.items()}:
            raise ValueError(f"{folder}: the weights do not fit diffusers' Flax UNet")
        self._params = unflatten_dict(params)
        return sum(value.size for value in params.values())

    def prepare(self, stage: Stage, arrays: dict[str, np.ndarray], layouts: Layouts) -> Callable[[], Any]:
        latents, states = jnp.asarray(arrays["latents"].transpose(0, 3, 1, 2)), jnp.asarray(arrays["states"])
        timesteps = jnp.full(stage.batch, arrays["timestep"], jnp.float32)
        unet = jax.jit(lambda params, *args: self._unet.apply({"params": params}, *args, return_dict=False)[0])
        return lambda: unet(self._params, latents, timesteps, states).block_until_ready()

    def array(self, result: jax.Array) -> np.ndarray:
        return super().array(result).transpose(0, 2, 3, 1)
