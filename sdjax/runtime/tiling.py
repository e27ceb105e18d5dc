"""Pictures past memory: latents decoded in overlapping tiles, whose pictures are blended."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

LEAST_TILE = 64  # latents: with smaller tiles than 512 pixels differences of colour between them are seen
OVERLAP = 0.25  # of a tile's side, at least


def tile_side(config: Any) -> int:
    """The side of the tiles of an autoencoder of this config, in latents: what it was trained at, 64 at least."""
    return max(LEAST_TILE, getattr(config, "sample_size", 0) // config.factor)


def decode_tiled(decode: Callable[[Array], Array], latents: Array, *, tile: int) -> Array:
    """decode(latents), [B h w C] -> [B H W D], with the memory of a decoded tile of `tile` x `tile` latents.

    sum over tiles k of w_k decode(latents[tile k]), one tile after the other. All tiles have one size, neighbours share
    a quarter of a side or more, and the first and the last lie at the edges. The weights w_k rise and fall linearly
    over that quarter and sum to 1 at every pixel. Latents that fit into a tile are decoded as they are; otherwise the
    result is another picture where `decode` depends on more than a neighbourhood (normalisation, attention): each tile
    has statistics of its own.
    """
    B, h, w, C = latents.shape
    rows, columns = min(tile, h), min(tile, w)
    if (rows, columns) == (h, w):
        return decode(latents)
    shape = jax.eval_shape(decode, jax.ShapeDtypeStruct((B, rows, columns, C), latents.dtype))
    factor = shape.shape[1] // rows
    (tops, vertical), (lefts, horizontal) = tiles(h, rows, factor), tiles(w, columns, factor)

    i, j = np.indices((len(tops), len(lefts))).reshape(2, -1)

    def add(picture: Array, at: tuple[Array, ...]) -> tuple[Array, None]:
        top, left, down, across = at
        decoded = decode(jax.lax.dynamic_slice(latents, (0, top, left, 0), (B, rows, columns, C)))
        start = (0, top * factor, left * factor, 0)
        before = jax.lax.dynamic_slice(picture, start, decoded.shape)
        weighted = down[:, None, None] * across[:, None] * decoded
        return jax.lax.dynamic_update_slice(picture, before + weighted, start), None

    empty = jnp.zeros((B, h * factor, w * factor, shape.shape[3]), shape.dtype)
    return jax.lax.scan(add, empty, (tops[i], lefts[j], vertical[i], horizontal[j]))[0]


def tiles(length: int, tile: int, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Where tiles start along an axis of latents, int32 [n], and their weights at its pixels, float32 [n tile*factor].

    They are spread evenly, the fewest that share int(OVERLAP * tile) latents or more.
    """
    shared = int(OVERLAP * tile)
    count = math.ceil((length - tile) / (tile - shared)) + 1
    starts = np.linspace(0, length - tile, count).round().astype(np.int32)
    distance = np.arange(tile * factor) + 0.5  # of a pixel's centre to the nearer end of the tile
    ramp = np.minimum(np.minimum(distance, distance[::-1]) / max(shared * factor, 1), 1)
    pixels = starts[:, None] * factor + np.arange(tile * factor)
    total = np.bincount(pixels.ravel(), np.tile(ramp, count))
    return starts, np.float32(ramp / total[pixels])
