"""What a denoiser is trained for: which noise it is shown, what it is to predict, what an error costs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sdjax.checkpoints.prediction import PREDICTION_TYPES
from sdjax.sampling import Scheduler
from sdjax.sampling.schedule import rescale_zero_terminal_snr
from sdjax.training.losses import add_noise, velocity
from sdjax.training.trained import Trained

BIASES = ("none", "earlier", "later", "range")


class Draws(NamedTuple):
    """All chance in the loss of a batch, each [B …] and standard normal but for the timesteps."""

    timesteps: Array
    """[B] int32"""
    noise: Array
    """[B h w C]"""
    posterior: Array
    """[B h w C] with which latents are drawn from the VAE's posterior"""
    offset: Array | None = None
    """[B 1 1 C]"""
    perturbation: Array | None = None
    """[B h w C]"""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss of a batch of latents x0 [B h w C]: the mean over images of weight * mean (prediction - target)^2.

    The network is shown x = sqrt(a) x0 + sqrt(1 - a) noise, a = alphas_cumprod[t]. The target is the noise (epsilon),
    sqrt(a) noise - sqrt(1 - a) x0 (v_prediction, arXiv:2202.00512) or x0 (sample).

    Attributes:
        alphas_cumprod: of each timestep, from 1 to 0.
        prediction_type: epsilon, v_prediction or sample.
        snr_gamma: min-SNR weights (arXiv:2303.09556): min(snr, gamma) is what an error of x0 costs at most,
            snr = a / (1 - a); that is the weight of `sample`, divided by snr that of epsilon, by snr + 1 that of v.
            None: each timestep weighs 1.
        noise_offset: o, noise + o * (one number for each image and channel) in place of the noise.
        input_perturbation: p, the network is shown noise + p * (more noise), and its target stays (arXiv:2301.11706).
        timestep_range: timesteps are drawn from first to last - 1; None: from all.
        timestep_bias_strategy: none, or which timesteps are drawn timestep_bias_multiplier times as often as others:
            the share timestep_bias_portion of them that has least noise (earlier) or most (later), or those from
            timestep_bias_begin to timestep_bias_end - 1 (range).
    """

    alphas_cumprod: tuple[float, ...]
    prediction_type: str = "epsilon"
    snr_gamma: float | None = None
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    timestep_range: tuple[int, int] | None = None
    timestep_bias_strategy: str = "none"
    timestep_bias_multiplier: float = 1.0
    timestep_bias_portion: float = 0.25
    timestep_bias_begin: int = 0
    timestep_bias_end: int = 1000

    def __post_init__(self) -> None:
        last = len(self.alphas_cumprod)
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type={self.prediction_type!r}: one of {', '.join(PREDICTION_TYPES)}")
        if self.timestep_bias_strategy not in BIASES:
            raise ValueError(f"timestep_bias_strategy={self.timestep_bias_strategy!r}: one of {', '.join(BIASES)}")
        if self.alphas_cumprod[-1] == 0 and self.prediction_type == "epsilon" and self._weights()[-1] > 0:
            raise ValueError(
                "epsilon says nothing of a picture where there is nothing but noise, as with zero terminal SNR: "
                f"train v_prediction, or timesteps up to {last - 1} (timestep_range)"
            )
        if not self._weights().sum() > 0:
            raise ValueError(f"timestep_range={self.timestep_range}: no timesteps of 0 to {last - 1}")

    @classmethod
    def of(cls, scheduler: Scheduler, *, zero_terminal_snr: bool = False, **options: object) -> Self:
        """Of a model's scheduler: its noise levels and what the model predicts, unless the options have another.

        zero_terminal_snr: noise levels rescaled so that the last timestep is noise alone (arXiv:2305.08891).
        """
        alpha_bar = scheduler.schedule.alpha_bar
        if zero_terminal_snr and alpha_bar[-1] > 0:
            alpha_bar = rescale_zero_terminal_snr(alpha_bar)
        prediction_type = options.pop("prediction_type", None) or scheduler.config["prediction_type"]
        return cls(alphas_cumprod=tuple(alpha_bar.tolist()), prediction_type=prediction_type, **options)

    def draws(self, key: Array, shape: tuple[int, ...]) -> Draws:
        """Of a batch of latents of this shape [B h w C]. The same whatever devices share the batch."""
        time, noise, posterior, offset, perturbation = jax.random.split(key, 5)
        B, *_, C = shape
        cumulated = jnp.asarray(np.cumsum(self._weights()), jnp.float32)
        t = jnp.searchsorted(cumulated, cumulated[-1] * jax.random.uniform(time, (B,)), side="right")
        return Draws(
            jnp.minimum(t, len(cumulated) - 1).astype(jnp.int32),
            jax.random.normal(noise, shape),
            jax.random.normal(posterior, shape),
            jax.random.normal(offset, (B, 1, 1, C)) if self.noise_offset else None,
            jax.random.normal(perturbation, shape) if self.input_perturbation else None,
        )

    def of_batch(self, trained: Trained, params: Mapping[str, Any], batch: Mapping[str, Any], draws: Draws) -> Array:
        """[B] the losses of a batch, of which the draws are all chance: a pure function, to be differentiated.

        params: of every component, see `trained.joined`. batch: see `sdjax.training`.
        """
        x0 = jax.lax.stop_gradient(trained.latents(params, batch, draws.posterior))
        x, target = self.noised(x0, draws)
        prediction = trained.predict(params, batch, x, draws.timesteps)
        return self.losses(prediction, target, draws.timesteps, batch.get("weights"), batch.get("mask"))

    def noised(self, x0: Array, draws: Draws) -> tuple[Array, Array]:
        """(what the network is shown, its target), each [B h w C], float32."""
        x0, noise, a = x0.astype(jnp.float32), draws.noise, self._a(draws.timesteps)
        if draws.offset is not None:
            noise = noise + self.noise_offset * draws.offset
        shown = noise if draws.perturbation is None else noise + self.input_perturbation * draws.perturbation
        targets = {"epsilon": noise, "v_prediction": velocity(x0, noise, a), "sample": x0}
        return add_noise(x0, shown, a), targets[self.prediction_type]

    def losses(
        self,
        prediction: Array,
        target: Array,
        timesteps: Array,
        weights: Array | None = None,
        mask: Array | None = None,
    ) -> Array:
        """[B] of each image, [B h w C]. weights [B] multiply them, mask [B h w 1] the error of each pixel."""
        error = jnp.square(prediction.astype(jnp.float32) - target)
        losses = jnp.mean(error if mask is None else error * mask, axis=(1, 2, 3)) * self._weight(timesteps)
        return losses if weights is None else losses * weights

    def _weight(self, timesteps: Array) -> Array | float:
        """[B] by min-SNR"""
        if self.snr_gamma is None:
            return 1.0
        snr = self._a(timesteps) / (1 - self._a(timesteps))
        least = jnp.minimum(snr, self.snr_gamma)
        return {"epsilon": least / snr, "v_prediction": least / (snr + 1), "sample": least}[self.prediction_type]

    def _a(self, timesteps: Array) -> Array:
        return jnp.asarray(self.alphas_cumprod, jnp.float32)[timesteps]

    def _weights(self) -> np.ndarray:
        """[T] how often each timestep is drawn"""
        count = len(self.alphas_cumprod)
        biased = int(self.timestep_bias_portion * count)
        often = {
            "none": slice(0, 0),
            "earlier": slice(0, biased),
            "later": slice(count - biased, count),
            "range": slice(self.timestep_bias_begin, self.timestep_bias_end),
        }
        weights = np.ones(count)
        weights[often[self.timestep_bias_strategy]] *= self.timestep_bias_multiplier
        first, end = self.timestep_range or (0, count)
        return np.where((np.arange(count) >= first) & (np.arange(count) < end), weights, 0)
