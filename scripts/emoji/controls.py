"""What the ControlNet learns from: drawings in other shapes than the model knows, and their edges."""

import argparse
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import recipe
from captions import own_color
from drawings import Drawings, Placement, color_shares, compose, place, random_placement
from edges import random_edges
from flax import nnx
from jax import Array
from scenes import SINGLE, Scenes, one_round

import sdjax
from sdjax.training import checkpoint

BATCH = 64  # pictures that are made at once
BENT = 0.035  # of a side, by which points are moved
STRETCHED = 0.1  # by which height and width differ from the mean one
SPREAD = Placement(zoom=0.06, shift=0.04, tilt=0.25, light=0.2)


class Controls(NamedTuple):
    """P pictures: latents float16 [P h w C], not scaled, edges, eight pixels a byte [P H W/8], captions [P forms L]."""

    latents: np.ndarray
    edges: np.ndarray
    input_ids: np.ndarray

    @classmethod
    def load(cls, folder: Path) -> "Controls":
        files = [np.load(path) for path in sorted(folder.glob("*.npz"))]
        return cls(*(np.concatenate([file[name] for file in files]) for name in cls._fields))


def is_unseen(name: str) -> bool:
    """Whether the ControlNet never sees this drawing: one in 25."""
    return zlib.crc32(name.encode()) % 25 == 0


def chosen(drawings: Drawings, unseen: bool) -> Drawings:
    """Those that the ControlNet learns from, or the others."""
    which = [n for n, name in enumerate(drawings.names) if is_unseen(name) == unseen]
    return Drawings([drawings.names[n] for n in which], drawings.rgba[which])


def bent(key: Array, rgba: Array, amount: float) -> Array:
    """A picture [S S C] whose points are moved smoothly, by `amount` of its side or so."""
    side = len(rgba)
    moved = jax.image.resize(amount * side * jax.random.normal(key, (2, 4, 4)), (2, side, side), "cubic")
    at = list(jnp.mgrid[:side, :side] + moved)
    channel = lambda plane: jax.scipy.ndimage.map_coordinates(plane, at, order=1)  # noqa: E731
    return jax.vmap(channel, in_axes=-1, out_axes=-1)(rgba)


def reshaped(key: Array, rgba: Array, size: int) -> Array:
    """A drawing [S S 4] uint8, bent, stretched and tilted, on a canvas [size size 4] in 0 to 1."""
    bend, stretch, at = jax.random.split(key, 3)
    placement = random_placement(at, SINGLE[0], SPREAD, 1.0)
    zoom = placement.zoom * (1 + STRETCHED * jax.random.uniform(stretch, (2,), minval=-1))
    return place(bent(bend, rgba.astype(jnp.float32) / 255, BENT), size, placement._replace(zoom=zoom))


@partial(jax.jit, static_argnames="size")
def reshaped_pictures(key: Array, rgba: Array, colors: Array, size: int) -> tuple[Array, Array]:
    """Drawings [B S S 4] over backgrounds [B 3] -> pictures [B size size 3] in 0 to 1, [B size size] what they hide."""
    placed = jax.vmap(partial(reshaped, size=size))(jax.random.split(key, len(rgba)), rgba)
    return compose(placed, colors), placed[..., 3]


def one_round_reshaped(drawings: Drawings, number: int) -> Iterator[tuple[Scenes, np.ndarray, np.ndarray]]:
    """Every drawing once: what is shown, the pictures [B H W 3] in 0 to 1 and their edges [B H W], in batches."""
    for i, shown in enumerate(one_round(drawings.names, number, BATCH, 0)):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), number), i)
        rgba, colors = (np.resize(x, (BATCH, *x.shape[1:])) for x in (drawings.rgba[shown.drawings], shown.colors()))
        made = reshaped_pictures(key, rgba, colors, recipe.SIZE)
        pictures, alpha = (np.asarray(x)[: shown.alone] for x in made)
        rng = np.random.default_rng((number, i))
        yield shown, pictures, np.stack([random_edges(rng, *each) for each in zip(pictures, alpha, strict=True)])


def make_controls(args: argparse.Namespace) -> None:
    """drawings.npz, a finished model -> controls/<number>.npz, for each round"""
    pipe = sdjax.StableDiffusionPipeline.from_pretrained(args.model, dtype="float32")
    drawings, encode = chosen(Drawings.load(args.work / "drawings.npz"), unseen=False), encoder(pipe.vae)
    own_colors = [own_color(name, color_shares(rgba)) for name, rgba in zip(drawings.names, drawings.rgba, strict=True)]
    for number in range(recipe.CONTROL_ROUNDS):
        if (path := args.work / "controls" / f"{number:02}.npz").exists():
            continue
        made = [
            each(pipe, drawings.names, own_colors, encode, *batch) for batch in one_round_reshaped(drawings, number)
        ]
        checkpoint.save(path, Controls(*map(np.concatenate, zip(*made, strict=True)))._asdict())
        print(path, flush=True)


def each(
    pipe: sdjax.StableDiffusionPipeline,
    names: Sequence[str],
    own_colors: Sequence[str | None],
    encode: Callable[[np.ndarray], np.ndarray],
    shown: Scenes,
    pictures: np.ndarray,
    edges: np.ndarray,
) -> Controls:
    """What is kept of a batch."""
    texts = shown.captions(names, own_colors)
    ids = pipe.tokenizer(np.ravel(texts).tolist()).reshape(*np.shape(texts), -1)
    return Controls(encode(pictures), np.packbits(edges, axis=-1), ids)


def encoder(vae: sdjax.AutoencoderKL) -> Callable[[np.ndarray], np.ndarray]:
    """A function of at most BATCH pictures [B H W 3] in 0 to 1 -> their latents float16 [B h w C], not scaled."""
    graphdef, params = nnx.split(vae)

    @jax.jit
    def encode(params: nnx.State, pictures: Array) -> Array:
        return nnx.merge(graphdef, params).encode(2 * pictures - 1).mode().astype(jnp.float16)

    return lambda pictures: np.asarray(encode(params, np.resize(pictures, (BATCH, *pictures.shape[1:]))))[
        : len(pictures)
    ]
