"""Latent consistency distillation (LCM, arXiv:2310.04378) as a LoRA (LCM-LoRA, arXiv:2311.05556)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sdjax.training.losses import add_noise
from sdjax.training.objective import Objective
from sdjax.training.trained import Trained

TIMESTEP_SCALING, SIGMA_DATA = 10.0, 0.5
"""Of the boundary condition, as the LCM scheduler has them"""
UNCONDITIONAL = "unconditional_"
UP = ".lora.up.weight"


class ConsistencyDraws(NamedTuple):
    """All chance in the loss of a batch, each [B …]."""

    steps: Array
    """[B] int32: which step of the solver"""
    guidance: Array
    """[B] the guidance scale that the student learns"""
    noise: Array
    """[B h w C] standard normal, as the next"""
    posterior: Array


@dataclass(frozen=True, kw_only=True)
class Consistency:
    """The student f, a model with a LoRA, is to give at any noise level what it gives a step of the model itself later.

    f(x, t) = skip(t) x + out(t) x0(x, t) is consistent along the paths of the model that is taught, with guidance: of
    the latents x at t_n, DDIM of that model, the same without its LoRA, makes those at t_(n-1), from which f (without a
    gradient) has to give the same; what it costs is sqrt(d^2 + huber_c^2) - huber_c. The student needs no guidance and
    few steps: sampler "lcm", guidance_scale=1.

    A batch has beside input_ids (or text) unconditional_input_ids (or unconditional_text): those of no caption; for
    SDXL the latter, of zeros.

    Attributes:
        objective: of the model that is taught: its noise levels, and what it predicts.
        solver_steps: of DDIM, evenly over the timesteps.
        guidance_range: the scales w of text + w (text - none), drawn evenly.
    """

    objective: Objective
    solver_steps: int = 50
    guidance_range: tuple[float, float] = (5.0, 15.0)
    huber_c: float = 1e-3

    def draws(self, key: Array, shape: tuple[int, ...]) -> ConsistencyDraws:
        """Of a batch of latents of this shape [B h w C]."""
        step, guidance, noise, posterior = jax.random.split(key, 4)
        return ConsistencyDraws(
            jax.random.randint(step, shape[:1], 0, self.solver_steps),
            jax.random.uniform(guidance, shape[:1], minval=self.guidance_range[0], maxval=self.guidance_range[1]),
            jax.random.normal(noise, shape),
            jax.random.normal(posterior, shape),
        )

    def of_batch(
        self, trained: Trained, params: Mapping[str, Any], batch: Mapping[str, Any], draws: ConsistencyDraws
    ) -> Array:
        """[B] the losses of a batch, as `Objective.of_batch`."""
        a = jnp.asarray(self.objective.alphas_cumprod, jnp.float32)
        every = len(a) // self.solver_steps
        ladder = jnp.asarray(np.arange(1, self.solver_steps + 1) * every - 1)
        begin = ladder[draws.steps]
        end = jnp.maximum(begin - every, 0)
        given = {name: own for name, own in batch.items() if not name.startswith(UNCONDITIONAL)}

        x0 = jax.lax.stop_gradient(trained.latents(params, given, draws.posterior))
        x = add_noise(x0, draws.noise, a[begin])
        student = self._consistent(trained, params, given, x, begin)

        clean, noise = self._guided(trained, _without_lora(params), batch, x, begin, draws.guidance)
        target = self._consistent(trained, params, given, add_noise(clean, noise, a[end]), end)
        difference = student - jax.lax.stop_gradient(target)
        losses = jnp.mean(jnp.sqrt(difference**2 + self.huber_c**2) - self.huber_c, axis=(1, 2, 3))
        return losses * batch.get("weights", 1.0)

    def _consistent(
        self, trained: Trained, params: Mapping[str, Any], batch: Mapping[str, Any], x: Array, t: Array
    ) -> Array:
        """f: skip(t) x + out(t) x0(x, t)"""
        clean, _ = self._split(trained.predict(params, batch, x, t), x, t)
        scaled = (TIMESTEP_SCALING * t.astype(jnp.float32))[:, None, None, None]
        square = scaled**2 + SIGMA_DATA**2
        return SIGMA_DATA**2 / square * x + scaled / jnp.sqrt(square) * clean

    def _guided(
        self, trained: Trained, params: Mapping[str, Any], batch: Mapping[str, Any], x: Array, t: Array, scale: Array
    ) -> tuple[Array, Array]:
        """(clean latents, noise) as the model that is taught sees them, with guidance, without a gradient."""
        texts = [name for name in batch if name.startswith(UNCONDITIONAL)]
        with_text = {name: own for name, own in batch.items() if name not in texts}
        without = with_text | {name.removeprefix(UNCONDITIONAL): batch[name] for name in texts}
        both = jax.tree.map(lambda *own: jnp.concatenate(own), with_text, without)
        x, t, params = jax.lax.stop_gradient((jnp.concatenate([x, x]), jnp.concatenate([t, t]), params))
        parts = self._split(trained.predict(params, both, x, t), x, t)
        scale = scale[:, None, None, None]
        halves = (jnp.split(own, 2) for own in parts)
        clean, noise = (text + scale * (text - none) for text, none in halves)
        return clean, noise

    def _split(self, prediction: Array, x: Array, t: Array) -> tuple[Array, Array]:
        """(clean latents, noise) of a prediction for noised latents x"""
        a = jnp.asarray(self.objective.alphas_cumprod, jnp.float32)[t][:, None, None, None]
        alpha, sigma, prediction = jnp.sqrt(a), jnp.sqrt(1 - a), prediction.astype(jnp.float32)
        if self.objective.prediction_type == "epsilon":
            return (x - sigma * prediction) / alpha, prediction
        if self.objective.prediction_type == "v_prediction":
            return alpha * x - sigma * prediction, alpha * prediction + sigma * x
        return prediction, (x - alpha * prediction) / sigma


def _without_lora(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the networks whose LoRAs add nothing."""
    return {
        component: {name: jnp.zeros_like(value) if name.endswith(UP) else value for name, value in own.items()}
        for component, own in params.items()
    }
