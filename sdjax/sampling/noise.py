"""The standard normal noise of seeds, in JAX: of the seed and the number of the draw alone.

It can be jitted, vmapped, pmapped and sharded.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.random import threefry2x32_p


def seed_keys(seeds: int | Sequence[int]) -> np.ndarray:
    """Seeds in 0 .. 2^64 - 1 -> uint32 [B 2], the key data of `jax.random.key(seed)`, also for seeds past 32 bits."""
    seeds = [seeds] if isinstance(seeds, int) else seeds
    return np.array([(seed >> 32, seed & 0xFFFFFFFF) for seed in map(int, seeds)], dtype=np.uint32).reshape(-1, 2)


INITIAL, POSTERIOR, MASKED, SHOWN = 0, 2**32 - 1, 2**32 - 2, 2**32 - 3
"""Numbers of `numbered_noise` that no row has: the initial noise, that of samples of a VAE's posterior, of a picture
and of what a mask leaves of it, and that on what a UNet is shown: a picture to make larger, or an embedding"""


def initial_noise(keys: Array, shape: tuple[int, ...]) -> Array:
    """The standard normal noise [B *shape], float32, that the images of these seeds start from."""
    return numbered_noise(keys, INITIAL, shape)


def row_noise(keys: Array, draw: Array | int, shape: tuple[int, ...]) -> Array:
    """The standard normal noise [B *shape], float32, that a row of the table adds: of the seed and its draw alone.

    draw: `Table.draw` of the row, [B] or one for all images.
    """
    return numbered_noise(keys, draw + 1, shape)


def numbered_noise(keys: Array, number: Array | int, shape: tuple[int, ...]) -> Array:
    """The noise [B *shape] of seeds that has this number, a uint32, [B] or one for all: INITIAL, or that of a row.

    `jax.random.normal` of `fold_in(key, number)`, as `jax_threefry_partitionable` has it, whether it is set or not.

    A value's counter is its place in the image, its random bits are the fraction of a float32 u in -1..1, and it is
    sqrt(2) erf^-1(u).
    """
    place = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    lowest = np.nextafter(np.float32(-1), np.float32(0))

    def one(key: Array, number: Array) -> Array:
        folded = threefry2x32_p.bind(*key, jnp.zeros_like(number), number)
        first, second = threefry2x32_p.bind(*folded, jnp.zeros_like(place), place)
        fraction = ((first ^ second) >> np.uint32(9)) | np.float32(1).view(np.uint32)
        u = (jax.lax.bitcast_convert_type(fraction, jnp.float32) - 1) * (1 - lowest) + lowest
        return np.float32(np.sqrt(2)) * jax.lax.erf_inv(jnp.maximum(lowest, u))

    numbers = jnp.broadcast_to(jnp.asarray(number, jnp.uint32), len(keys))
    return jax.vmap(one)(jnp.asarray(keys), numbers)
