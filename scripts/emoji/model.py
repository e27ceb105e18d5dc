"""Text encoder and UNet as one, and the diffusers folder that is made of them, or that training goes on from."""

import argparse
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import recipe
from autoencoder import trained_vae
from flax import nnx
from latents import Latents
from parts import adam, muon, save_untrained, trained
from sketch import Sketch
from vocabulary import tokenizer

from sdjax import StableDiffusionPipeline
from sdjax.models import CLIPTextModel, UNet2DConditionModel

TEXT, UNET = ["text_encoder", "sketch"], ["unet"]


class TextToLatents(nnx.Module):
    """The text encoder and the UNet, trained as one, and what teaches the first before there is the second."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel):
        self.text_encoder, self.unet = text_encoder, unet
        size, channels = unet.config.sample_size, unet.config.in_channels
        self.sketch = Sketch(text_encoder.config.hidden_size, size, channels, recipe.SQUARES)


def untrained(args: argparse.Namespace) -> TextToLatents:
    """For the vocabulary that there is."""
    size = len(tokenizer(args.work).vocab)
    special = {"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    text_encoder = CLIPTextModel.from_config({**recipe.TEXT, "vocab_size": size, **special}, dtype=args.dtype)
    return TextToLatents(text_encoder, UNet2DConditionModel.from_config(recipe.UNET, dtype=args.dtype))


def begin(args: argparse.Namespace) -> None:
    """A finished model of this recipe -> tokenizer, vae.npz, text.npz and begun.npz, from which training goes on"""
    pipe = StableDiffusionPipeline.from_pretrained(args.model, dtype="float32")
    pipe.tokenizer.save_pretrained(args.work / "tokenizer")
    model = TextToLatents(pipe.text_encoder, pipe.unet)
    save_untrained(pipe.vae, args.work / "vae.npz", None, adam(1.0))
    save_untrained(model, args.work / "text.npz", TEXT, muon(1.0))
    save_untrained(model, args.work / "begun.npz", UNET, muon(1.0))


def pipeline(args: argparse.Namespace, scaling_factor: float) -> StableDiffusionPipeline:
    """The trained autoencoder with a text encoder and UNet that have no values yet."""
    vae, model = trained_vae(args, decoder=True), nnx.eval_shape(partial(untrained, args))
    vae.config = dataclasses.replace(vae.config, scaling_factor=scaling_factor)
    return StableDiffusionPipeline(model.text_encoder, model.unet, vae, tokenizer(args.work), recipe.SCHEDULER)


def export(args: argparse.Namespace) -> None:
    """The averaged weights as a diffusers folder in float16."""
    pipe = pipeline(args, Latents.load(args.work / "latents").scaling_factor())
    model = trained(nnx.eval_shape(partial(untrained, args)), args.work / "unet.npz")
    pipe.text_encoder, pipe.unet, pipe.vae = half(model.text_encoder), half(model.unet), half(pipe.vae)
    pipe.save_pretrained(args.out)
    size = sum(file.stat().st_size for file in args.out.rglob("*.safetensors"))
    print(f"{args.out}: {size / 1e6:.1f} MB of weights")


def half(model: nnx.Module) -> nnx.Module:
    """The model with float16 parameters."""
    graphdef, params = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params))
