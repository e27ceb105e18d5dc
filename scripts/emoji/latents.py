"""The stage `latents`: what the text encoder and the UNet learn from, computed once and kept by rounds."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import recipe
from autoencoder import trained_vae
from captions import own_color
from drawings import Drawings, color_shares
from flax import nnx
from jax import Array
from parts import replicated
from scenes import GROUNDS, Scenes, one_round, random_pictures
from vocabulary import tokenizer

from sdjax.runtime import parallel
from sdjax.training import checkpoint

BATCH = 64  # pictures that are encoded at once


class Latents(NamedTuple):
    """P pictures: latents float16 [P h w C] and the token ids of their captions [P forms L].

    upright: the latents when every drawing has the mean placement, [P h w C].
    """

    latents: np.ndarray
    upright: np.ndarray
    input_ids: np.ndarray

    @classmethod
    def load(cls, folder: Path) -> "Latents":
        files = [np.load(path) for path in sorted(folder.glob("*.npz"))]
        return cls(*(np.concatenate([file[name] for file in files]) for name in cls._fields))

    def scaling_factor(self) -> float:
        """What makes their standard deviation 1."""
        return float(1 / self.latents.std(dtype=np.float64))


def make_latents(args: argparse.Namespace) -> None:
    """The averaged encoder's latents, with captions, in rounds: latents/<number>.npz"""
    drawings, tokens = Drawings.load(args.work / "drawings.npz"), tokenizer(args.work)
    own_colors = [own_color(name, color_shares(rgba)) for name, rgba in zip(drawings.names, drawings.rgba, strict=True)]
    encoded = encoder(args, drawings.rgba)
    for number in range(recipe.ROUNDS):
        path, alike = (args.work / "latents" / f"{n:02}.npz" for n in (number, number - len(GROUNDS)))
        if path.exists():
            continue
        known = np.load(alike)["upright"] if alike.exists() else []  # of the same drawings on the same backgrounds
        latents, upright, texts = [], [], []
        for i, shown in enumerate(one_round(drawings.names, number, BATCH, int(BATCH * recipe.PAIRS))):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(2), number), i)
            latents += [*encoded(key, shown, 1.0)]
            same = known[len(texts) :][: shown.alone]
            upright += [*same, *encoded(key, shown.after(len(same)), 0.0)]
            texts += shown.captions(drawings.names, own_colors)
        ids = tokens(np.ravel(texts).tolist()).reshape(*np.shape(texts), -1)
        checkpoint.save(path, Latents(np.stack(latents), np.stack(upright), ids)._asdict())
        print(path, flush=True)


def encoder(args: argparse.Namespace, rgba: np.ndarray) -> Callable[[Array, Scenes, float], np.ndarray]:
    """A function (key, at most BATCH scenes, chance) -> their latents."""
    graphdef, params = nnx.split(trained_vae(args))
    params, mesh = replicated(params), parallel.data_mesh()
    pictures = jax.jit(partial(random_pictures, size=recipe.SIZE))

    @jax.jit
    def encode(params: nnx.State, x: Array) -> Array:
        return nnx.merge(graphdef, params).encode(x).mode().astype(jnp.float16)

    def encoded(key: Array, shown: Scenes, chance: float) -> np.ndarray:
        x = pictures(key, rgba[shown.drawings], rgba[shown.beside], shown.colors(), chance=chance)
        padded = parallel.pad(np.asarray(x), parallel.padded_size(len(x), mesh.size))
        return np.asarray(encode(params, parallel.split(padded, mesh)))[: len(x)]

    return encoded
