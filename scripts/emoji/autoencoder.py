"""The stages `vae` and `decoder`: an autoencoder of drawings over backgrounds."""

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import recipe
from drawings import COLORS, Drawings
from flax import nnx
from jax import Array
from parts import adam, fit_parts, initialised, over_devices, trained
from scenes import random_pictures

from sdjax.models import AutoencoderKL
from sdjax.models.vae import DiagonalGaussian
from sdjax.training import losses
from sdjax.training.step import LossAndMetrics

DECODER = ["decoder", "post_quant_conv"]


def new_vae(dtype: str) -> AutoencoderKL:
    return AutoencoderKL.from_config(recipe.VAE, dtype=dtype)


def trained_vae(args: argparse.Namespace, decoder: bool = False) -> AutoencoderKL:
    """The autoencoder with its averaged weights; decoder: with those of decoder.npz, if there is one."""
    vae = trained(nnx.eval_shape(partial(new_vae, args.dtype)), args.work / "vae.npz")
    path = args.work / "decoder.npz"
    return trained(vae, path, DECODER) if decoder and path.exists() else vae


def vae_loss(vae: AutoencoderKL, data: dict[str, Any], key: Array, *, batch: int) -> LossAndMetrics:
    """Reconstruction and KL of a random batch of drawings over random backgrounds."""
    draw, color, placement, noise = jax.random.split(key, 4)
    rgba = data["rgba"][jax.random.randint(draw, (batch,), 0, len(data["rgba"]))]
    colors = data["colors"][jax.random.randint(color, (batch,), 0, len(data["colors"]))]
    x = over_devices(random_pictures(placement, rgba, rgba[: int(batch * recipe.PAIRS)], colors, recipe.SIZE))
    q = vae.encode(x)
    posterior = DiagonalGaussian(q.mean.astype(jnp.float32), q.logvar.astype(jnp.float32))
    y = vae.decode(posterior.sample(jax.random.normal(noise, posterior.mean.shape))).astype(jnp.float32)
    loss = losses.reconstruction_loss(y, x) + recipe.KL_WEIGHT * losses.kl_divergence(posterior)
    return loss, {"psnr": losses.psnr(y, x), "latent_std": posterior.mean.std()}


def fit_vae(args: argparse.Namespace, stage: str, vae: AutoencoderKL, parts: list[str] | None) -> None:
    data = {"rgba": Drawings.load(args.work / "drawings.npz").rgba, "colors": COLORS}
    loss = partial(vae_loss, batch=args.vae_batch)
    fit_parts(args, stage, vae, parts, loss, adam(args.vae_rate), data, seed=1, warmup=100)


def train_vae(args: argparse.Namespace) -> None:
    """drawings.npz -> vae.npz"""
    fit_vae(args, "vae", initialised(partial(new_vae, args.dtype)), None)


def train_decoder(args: argparse.Namespace) -> None:
    """Trains the decoder on: the latents, and so the UNet, stay as they are. vae.npz -> decoder.npz"""
    fit_vae(args, "decoder", trained_vae(args), DECODER)
