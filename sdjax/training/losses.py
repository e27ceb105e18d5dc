"""What the autoencoder and the UNet of Stable Diffusion minimise, and what they are given in training."""

import jax
import jax.numpy as jnp
from jax import Array

from sdjax.models.vae import DiagonalGaussian


def reconstruction_loss(x: Array, target: Array) -> Array:
    """mean |d| + mean d^2 + mean |dd/dx| + mean |dd/dy| with d = x - target: pictures [B H W 3] in [-1, 1].

    The gradients (differences of neighbouring pixels) make a blurred edge cost more than a wrong shade.
    """
    d = x - target
    return jnp.abs(d).mean() + (d**2).mean() + jnp.abs(jnp.diff(d, axis=1)).mean() + jnp.abs(jnp.diff(d, axis=2)).mean()


def kl_divergence(q: DiagonalGaussian) -> Array:
    """KL(q || N(0, 1)), the mean over all elements: (mean^2 + var - 1 - log var) / 2"""
    return 0.5 * (q.mean**2 + jnp.exp(q.logvar) - 1 - q.logvar).mean()


def psnr(x: Array, target: Array) -> Array:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1], the mean over the batch: 10 log10(4 / mse)"""
    mse = ((x.clip(-1, 1) - target) ** 2).mean(axis=(1, 2, 3))
    return (10 * jnp.log10(4 / mse)).mean()


def add_noise(x0: Array, noise: Array, alphas_cumprod: Array) -> Array:
    """The latents that the UNet sees, [B H W C], for one alphas_cumprod [B] an image: sqrt(a) x0 + sqrt(1 - a) noise"""
    a = alphas_cumprod[:, None, None, None]
    return jnp.sqrt(a) * x0 + jnp.sqrt(1 - a) * noise


def velocity(x0: Array, noise: Array, alphas_cumprod: Array) -> Array:
    """The target of v prediction: sqrt(a) noise - sqrt(1 - a) x0 (arXiv:2202.00512, section 4)"""
    return add_noise(noise, -x0, alphas_cumprod)


def denoising_loss(prediction: Array, target: Array) -> Array:
    """mean (prediction - target)^2; of velocities, it weights the error of x0 by SNR + 1 (arXiv:2202.00512, table 1)"""
    return jnp.mean((prediction - target) ** 2)


def drop_captions(key: Array, input_ids: Array, empty: Array, rate: float) -> Array:
    """Each row of input_ids [B L] replaced by `empty` [L] with probability `rate` (arXiv:2207.12598)"""
    dropped = jax.random.bernoulli(key, rate, (len(input_ids), 1))
    return jnp.where(dropped, empty, input_ids)
