"""Activations, computed in float32 and rounded once to the dtype of x: in bfloat16 CPUs would round after each step."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


def _in_float32(f: Callable[[Array], Array]) -> Callable[[Array], Array]:
    @functools.wraps(f)
    def activation(x: Array) -> Array:
        return f(x.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)

    return activation


@_in_float32
def silu(x: Array) -> Array:
    """x sigmoid(x)"""
    return jax.nn.silu(x)


@_in_float32
def gelu(x: Array) -> Array:
    """x Phi(x) = x (1 + erf(x / sqrt(2))) / 2, the exact form (arXiv:1606.08415)."""
    return x * (1 + jax.lax.erf(x * 0.5**0.5)) / 2


@_in_float32
def geglu(x: Array) -> Array:
    """a gelu(b) of x = [a, b] (arXiv:2002.05202): [... 2C] -> [... C]"""
    a, b = jnp.split(x, 2, axis=-1)
    return a * gelu(b)


@_in_float32
def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x): what OpenAI's CLIP has for gelu."""
    return x * jax.nn.sigmoid(1.702 * x)
