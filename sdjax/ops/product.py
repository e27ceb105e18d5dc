"""The product of activations and a matrix, accumulated in float32."""

import jax.numpy as jnp
from jax import Array


def product(x: Array, kernel: Array, bias: Array | None = None) -> Array:
    """x W + b: [... C], [C N], [N] -> [... N] in the dtype of x; sums, the bias included, are float32."""
    y = jnp.matmul(x, kernel, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))
    return (y if bias is None else y + bias).astype(x.dtype)
