"""ControlNet (arXiv:2302.05543): a copy of the UNet's half on the way down is trained to see a picture."""

from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sdjax.models import ControlNetModel
from sdjax.pipeline import StableDiffusionPipeline
from sdjax.runtime.network import Graph
from sdjax.training.trained import Trained, Tree, copied, described, dtype_of, filled, in_float32, needed, parameters

NAME = "controlnet"
CHANNELS = (16, 32, 96, 256)
"""Of the convolutions that make the picture as small as the latents, each but the first halving it; as published"""


def begin(
    pipe: StableDiffusionPipeline,
    controlnet: ControlNetModel | None = None,
    *,
    texts_cached: bool = False,
    pictures_cached: bool = True,
    gradient_checkpointing: bool = False,
) -> Trained:
    """A ControlNet for a pipeline's UNet, which at first adds nothing, or a given one to be trained further."""
    if controlnet is None:
        levels = pipe.vae.config.factor.bit_length()
        widths = CHANNELS[:levels] + CHANNELS[-1:] * (levels - len(CHANNELS))
        controlnet = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=widths)
    graphs = {NAME: Graph(copied(controlnet, gradient_checkpointing=gradient_checkpointing))}
    frozen = {}
    for name in needed(pipe, texts_cached=texts_cached, pictures_cached=pictures_cached):
        graphs[name] = Graph(copied(getattr(pipe, name), gradient_checkpointing=gradient_checkpointing))
        frozen[name] = parameters(getattr(pipe, name))
    initial = {NAME: in_float32(parameters(controlnet))}
    save, install = partial(_save, controlnet=controlnet), partial(_install, pipe, controlnet)
    return Trained(graphs, initial, frozen, **described(pipe), save=save, install=install)


def _save(path: Path, tree: Tree, *, controlnet: ControlNetModel, dtype: Any = np.float32) -> None:
    """Writes a folder, as diffusers has it."""
    filled(controlnet, tree[NAME], jnp.dtype(dtype)).save_pretrained(path)


def _install(pipe: StableDiffusionPipeline, controlnet: ControlNetModel, tree: Tree) -> None:
    setattr(pipe, NAME, filled(controlnet, tree[NAME], dtype_of(pipe)))
