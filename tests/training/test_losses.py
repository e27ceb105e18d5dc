"""Losses against diffusers, PyTorch and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from sdjax import sampling
from sdjax.models.vae import DiagonalGaussian
from sdjax.training import losses


def test_noise_and_velocity_are_those_of_diffusers():
    scheduler = DDPMScheduler(1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    alphas = jnp.asarray(sampling.from_config("ddpm").schedule.alpha_bar, jnp.float32)
    np.testing.assert_allclose(alphas, scheduler.alphas_cumprod, rtol=2e-4)
    rng = np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 3, 4, 4, 8), dtype=np.float32)
    t = np.array([0, 500, 999])
    x, v = (f(jnp.asarray(x0), jnp.asarray(noise), alphas[t]) for f in (losses.add_noise, losses.velocity))
    tensors = torch.from_numpy(x0), torch.from_numpy(noise), torch.from_numpy(t)
    np.testing.assert_allclose(x, scheduler.add_noise(*tensors), atol=1e-4)
    np.testing.assert_allclose(v, scheduler.get_velocity(*tensors), atol=1e-4)


def test_kl_is_torchs():
    rng = np.random.default_rng(0)
    mean, logvar = rng.standard_normal((2, 2, 3, 3, 4), dtype=np.float32)
    q = torch.distributions.Normal(torch.from_numpy(mean), torch.from_numpy(np.exp(logvar / 2)))
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).mean()
    actual = losses.kl_divergence(DiagonalGaussian(jnp.asarray(mean), jnp.asarray(logvar)))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_reconstruction_loss_and_psnr():
    target = jnp.zeros((2, 8, 8, 3))
    assert losses.reconstruction_loss(target, target) == 0
    np.testing.assert_allclose(losses.reconstruction_loss(target + 0.5, target), 0.5 + 0.25)
    step = target.at[:, :, 4:].set(1.0)
    np.testing.assert_allclose(losses.reconstruction_loss(step, target), 0.5 + 0.5 + 0 + 1 / 7, rtol=1e-6)
    np.testing.assert_allclose(losses.psnr(target + 0.2, target), 20.0, rtol=1e-5)


def test_captions_are_dropped_at_the_rate():
    ids, empty = jnp.ones((4000, 5), jnp.int32), jnp.zeros(5, jnp.int32)
    dropped = np.asarray(losses.drop_captions(jax.random.key(0), ids, empty, 0.1))
    assert (dropped == dropped[:, :1]).all()
    assert (dropped[:, 0] == 0).mean() == pytest.approx(0.1, abs=0.02)
