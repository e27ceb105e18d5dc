"""The stages `text` and `unet`: captions to the latents of what they describe."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import recipe
import retrieval
from drawings import Drawings
from flax import nnx
from jax import Array
from latents import Latents
from model import TEXT, UNET, TextToLatents, pipeline, untrained
from parts import fit_parts, initialised, muon, over_devices, trained
from sketch import with_reading_error
from vocabulary import tokenizer

from sdjax import sampling
from sdjax.training import losses
from sdjax.training.step import LossAndMetrics, TrainState


def latents_and_captions(args: argparse.Namespace) -> dict[str, Any]:
    """What `random_examples` draws from."""
    pool = Latents.load(args.work / "latents")
    return {**pool._asdict(), "scaling_factor": pool.scaling_factor(), "empty": tokenizer(args.work)("")[0]}


def random_examples(key: Array, batch: int, data: dict[str, Array]) -> tuple[Array, Array, Array]:
    """Latents, as placed and upright [B h w C], scaled to a standard deviation of 1, and a caption of each [B L]."""
    draw, form = jax.random.split(key)
    P, F, _ = data["input_ids"].shape
    p, f = (jax.random.randint(key, (batch,), 0, high) for key, high in ((draw, P), (form, F)))
    placed, upright = (data[name][p].astype(jnp.float32) * data["scaling_factor"] for name in ("latents", "upright"))
    return placed, upright, data["input_ids"][p, f]


def text_loss(model: TextToLatents, data: dict[str, Any], key: Array, *, batch: int) -> LossAndMetrics:
    """The error of the text encoder's sketch of a random batch of drawings, of which it has only the captions."""
    _, upright, ids = over_devices(random_examples(key, batch, data))
    return model.sketch.error(model.text_encoder(ids), upright).mean(), {}


def unet_loss(model: TextToLatents, data: dict[str, Any], key: Array, *, batch: int) -> LossAndMetrics:
    """The error in the velocity of a random batch of latents, at times spread evenly.

    Added are the error of the text encoder's sketch, which so goes on learning by the short way too, and that of the
    UNet in reading it.
    """
    examples, drop, time, noise = jax.random.split(key, 4)
    x0, upright, ids = random_examples(examples, batch, data)
    ids = losses.drop_captions(drop, ids, data["empty"], recipe.CAPTION_DROPOUT)
    alphas_cumprod = jnp.asarray(sampling.from_config(recipe.SCHEDULER).schedule.alpha_bar, jnp.float32)
    u = (jnp.arange(batch) + jax.random.uniform(time, (batch,))) / batch
    t = jnp.int32(len(alphas_cumprod) * u).clip(max=len(alphas_cumprod) - 1)
    noise = jax.random.normal(noise, x0.shape)
    x, v = losses.add_noise(x0, noise, alphas_cumprod[t]), losses.velocity(x0, noise, alphas_cumprod[t])
    upright, x, v, t, ids = over_devices((upright, x, v, t, ids))
    hidden_states = model.text_encoder(ids)
    prediction, reading = with_reading_error(model.unet, recipe.SQUARES, x, t, hidden_states)
    denoising = losses.denoising_loss(prediction.astype(jnp.float32), v)
    asked = (ids != data["empty"]).any(axis=-1)
    sketch = jnp.mean(asked * model.sketch.error(hidden_states, upright))
    metrics = {"denoising": denoising, "sketch": sketch, "reading": reading}
    return denoising + sketch + recipe.READING_WEIGHT * reading, metrics


def train_text(args: argparse.Namespace) -> None:
    """latents -> text.npz"""
    loss, data = partial(text_loss, batch=args.text_batch), latents_and_captions(args)
    fit_parts(
        args, "text", initialised(partial(untrained, args)), TEXT, loss, muon(args.text_rate), data, seed=4, warmup=100
    )


def train_unet(args: argparse.Namespace) -> None:
    """latents, text.npz -> unet.npz, which has the text encoder too"""
    loss, data = partial(unet_loss, batch=args.unet_batch), latents_and_captions(args)
    measuring = {"measure": measure_retrieval(args, data["scaling_factor"]), "measure_steps": args.measure_steps}
    fit_parts(args, "unet", beginning(args), None, loss, muon(args.unet_rate), data, seed=3, warmup=200, **measuring)


def beginning(args: argparse.Namespace) -> TextToLatents:
    """What `unet` starts from: the text encoder of text.npz, and a new UNet or that of the model which `begin` read."""
    model, begun = trained(initialised(partial(untrained, args)), args.work / "text.npz", TEXT), args.work / "begun.npz"
    return trained(model, begun, UNET) if begun.exists() else model


def measure_retrieval(args: argparse.Namespace, scaling_factor: float) -> Callable[[TrainState], dict[str, float]]:
    """A function that draws 64 names with the averaged weights, each on a colour of its own -> shares recognised."""
    drawings = Drawings.load(args.work / "drawings.npz")
    asked, gallery = retrieval.asked_for(drawings.names, 64), retrieval.Gallery(drawings)
    pipe = pipeline(args, scaling_factor)

    def measure(state: TrainState) -> dict[str, float]:
        for name in ("text_encoder", "unet"):
            nnx.update(getattr(pipe, name), jax.tree.map(jnp.copy, state.ema[name]))  # the step reuses its own memory
        pictures = retrieval.draw(pipe, asked.prompts, steps=12, guidance=3.0)
        return gallery.scores(pictures, asked)

    return measure
