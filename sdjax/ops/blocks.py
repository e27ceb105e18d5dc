"""Arrays that are made block after block."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array


def largest_divisor(n: int, most: int) -> int:
    """The largest divisor of n up to most, 1 at least."""
    return next(d for d in range(max(1, min(n, most)), 0, -1) if n % d == 0)


def unfilled(x: Array, shape: Sequence[int]) -> Array:
    """An array like x, of any values, made when x is there: zeros XLA would make when the program begins."""
    return jnp.broadcast_to(x[(0,) * x.ndim], shape)
