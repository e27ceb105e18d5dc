"""bfloat16 arrays as the integers that they also are.

On CPUs XLA converts bfloat16 to float32 and back for everything that is no product, movement of data included: a copy
of integers is several times faster. Bits have no gradient: what moves them defines the gradient.
"""

import jax
import jax.numpy as jnp
from jax import Array


def to_bits(x: Array) -> Array:
    """bfloat16 as uint16; other dtypes as they are."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def from_bits(x: Array) -> Array:
    """The inverse of `to_bits`."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x
