"""A whole network is trained: the UNet, and the text encoders if they are to be."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sdjax import sampling
from sdjax.pipeline import StableDiffusionPipeline
from sdjax.runtime.network import Graph
from sdjax.training.trained import (
    TEXT_ENCODERS,
    Trained,
    Tree,
    copied,
    described,
    dtype_of,
    filled,
    in_float32,
    move_to_host,
    needed,
    parameters,
)

ZERO_TERMINAL_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
"""What a scheduler has to have for a model that was trained so (arXiv:2305.08891)"""


def begin(
    pipe: StableDiffusionPipeline,
    *,
    train_text_encoder: bool = False,
    texts_cached: bool = False,
    pictures_cached: bool = True,
    gradient_checkpointing: bool = False,
) -> Trained:
    """The whole UNet of a pipeline and, with train_text_encoder, its text encoders.

    Their parameters are taken off the pipeline's devices, where what is trained needs the memory.
    Raises ValueError for cached states of text encoders that are trained.
    """
    if texts_cached and train_text_encoder:
        raise ValueError("text encoders are trained: their states cannot be cached")
    graphs, initial, frozen = {}, {}, {}
    for name in needed(pipe, texts_cached=texts_cached, pictures_cached=pictures_cached):
        graphs[name] = Graph(copied(getattr(pipe, name), gradient_checkpointing=gradient_checkpointing))
        is_trained = name == "unet" or (train_text_encoder and name in TEXT_ENCODERS)
        params = parameters(getattr(pipe, name))
        if is_trained:
            initial[name] = in_float32(params)
            move_to_host(getattr(pipe, name))
        else:
            frozen[name] = params
    save, install = partial(_save, pipe), partial(_install, pipe)
    return Trained(graphs, initial, frozen, **described(pipe), save=save, install=install)


def _save(
    pipe: StableDiffusionPipeline,
    path: Path,
    tree: Tree,
    *,
    dtype: Any = np.float32,
    zero_terminal_snr: bool = False,
    prediction_type: str | None = None,
) -> None:
    """Writes the whole pipeline as a folder, what was trained in this dtype.

    zero_terminal_snr, prediction_type: what the model was trained for, if the pipeline's scheduler has it otherwise.
    """
    own = copy.copy(pipe)
    for name, params in tree.items():
        setattr(own, name, filled(getattr(pipe, name), params, jnp.dtype(dtype)))
    changed = (ZERO_TERMINAL_SNR if zero_terminal_snr else {}) | (
        {"prediction_type": prediction_type} if prediction_type else {}
    )
    if changed:
        kind = {"_class_name": "DDIMScheduler"} if zero_terminal_snr else {}
        own.scheduler = sampling.from_config({**pipe.scheduler.config, **kind, **changed})
    own.save_pretrained(path)


def _install(pipe: StableDiffusionPipeline, tree: Tree) -> None:
    for name, params in tree.items():
        setattr(pipe, name, filled(getattr(pipe, name), params, dtype_of(pipe)))
