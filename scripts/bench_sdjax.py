"""sdjax's side of `bench.py`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from bench_stages import GUIDANCE_SCALE, NEGATIVE_PROMPT, PROMPT, TIMESTEP, Stage

import sdjax
from sdjax.runtime.network import Graph


class Sdjax:
    """The pipeline on one device, see `bench_side.Side`."""

    def __init__(self, folder: Path, dtype: str, device: str):
        self.versions = {"sdjax": sdjax.__version__, "jax": jax.__version__, "flax": flax.__version__}
        self._device = jax.devices()[0]
        self.device_name = None if device == "cpu" else self._device.device_kind
        self._dtype = dtype
        mesh = sdjax.runtime.parallel.data_mesh([self._device])
        self._pipe = sdjax.StableDiffusionPipeline.from_pretrained(folder, dtype, mesh=mesh)
        self._pipe.set_progress_bar_config(disable=True)
        self._params = self._pipe.params

    def prepare(self, stage: Stage, arrays: dict[str, np.ndarray], layouts: Any) -> Callable[[], Any]:
        return getattr(self, f"_{stage.what}")(stage, **arrays)

    def _matmul(self, stage: Stage, a: np.ndarray, b: np.ndarray) -> Callable[[], Any]:
        product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(a.dtype))
        return self._compiled(product, *(jnp.asarray(x, self._dtype) for x in (a, b)))

    def _text_encoder(self, stage: Stage, ids: np.ndarray) -> Callable[[], Any]:
        return self._network("text_encoder", lambda model, ids: model(ids), ids)

    def _unet(self, stage: Stage, latents: np.ndarray, states: np.ndarray) -> Callable[[], Any]:
        timesteps = np.full(stage.batch, TIMESTEP, np.float32)
        return self._network("unet", lambda model, *args: model(*args), latents, timesteps, states)

    def _vae(self, stage: Stage, latents: np.ndarray) -> Callable[[], Any]:
        return self._network("vae", lambda model, latents: model.decode(latents), latents)

    def _picture(self, stage: Stage, latents: np.ndarray) -> Callable[[], Any]:
        options = {"num_inference_steps": stage.steps, "guidance_scale": GUIDANCE_SCALE, "output_type": "np"}
        prompts = {"prompt": PROMPT, "negative_prompt": NEGATIVE_PROMPT, "num_images_per_prompt": stage.batch}
        return lambda: self._pipe(**prompts, **options, latents=latents).images

    def _network(self, name: str, call: Callable, *arrays: np.ndarray) -> Callable[[], Any]:
        graph = Graph(getattr(self._pipe, name))
        run = jax.jit(lambda params, *args: call(graph.merge(params), *args))
        return self._compiled(run, self._params[name], *map(jnp.asarray, arrays))

    def _compiled(self, run: Callable, *args: Any) -> Callable[[], Any]:
        return lambda: jax.block_until_ready(run(*args))

    def array(self, result: Any) -> np.ndarray:
        return np.asarray(result, np.float32)

    def layouts(self, stage: Stage) -> dict[str, Any]:
        return {}

    def flops(self, stage: Stage) -> None:
        return None

    def device_peak(self, *, reset: bool) -> int | None:
        """Since the start of the process: JAX cannot begin again."""
        return None if self.device_name is None else self._device.memory_stats()["peak_bytes_in_use"]


def load(name: str, folder: Path, dtype: str, device: str) -> Sdjax:
    """The side of this name."""
    return Sdjax(folder, dtype, device)
