"""Attention on CPUs, in blocks of queries."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from sdjax.ops.bits import from_bits, to_bits

BLOCK = 256  # queries at a time: their scores stay in a CPU's cache
LEAST_BLOCK, LEAST_SCORES = 64, 2**18  # queries of a block and scores of a head, below which blocks do not pay


def pays(q: Array, k: Array) -> bool:
    """Whether blocks are worth while for [B Lq H D] and [B Lk H D]."""
    return q.shape[1] * k.shape[1] >= LEAST_SCORES and math.gcd(q.shape[1], BLOCK) >= LEAST_BLOCK


@jax.custom_jvp
def in_blocks(q: Array, k: Array, v: Array) -> Array:
    """softmax(q k^T / sqrt(D)) v, head by head: [B Lq H D], [B Lk H D], [B Lk H D] -> [B Lq H D]"""
    return _in_blocks(q, k, v, to_bits)


@in_blocks.defjvp
def _jvp(inputs: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    return jax.jvp(partial(_in_blocks, moved_as=lambda x: x), inputs, tangents)


def _in_blocks(q: Array, k: Array, v: Array, moved_as: Callable[[Array], Array]) -> Array:
    """Queries are the columns of both products, k q^T and v^T weights: hundreds of columns are faster than D.

    The weights' sums are one more row of the second product: divided by last, of D numbers and not of Lk.
    """
    B, L, H, D = q.shape
    dtype, block = q.dtype, math.gcd(L, BLOCK)
    q, k, v = (moved_as(x).transpose(0, 2, 3, 1).reshape(B * H, D, -1) for x in (q, k, v))
    ones = jnp.broadcast_to(moved_as(jnp.ones((), dtype)), (B * H, 1, v.shape[2]))

    def one_head(qkv: tuple[Array, Array, Array]) -> Array:
        q, k, v = qkv
        k, v = from_bits(k), from_bits(v)

        def one_block(q: Array) -> Array:
            scores = jnp.matmul(k, from_bits(q), preferred_element_type=jnp.float32)
            weights = jnp.exp((scores - scores.max(0)) * D**-0.5).astype(dtype)
            sums = jnp.matmul(v, weights, preferred_element_type=jnp.float32)
            return moved_as((sums[:D] / sums[D]).astype(dtype))

        return jax.lax.map(one_block, q)

    operands = q.reshape(B * H, D, L // block, block).swapaxes(1, 2), k.swapaxes(1, 2), jnp.concatenate([v, ones], 1)
    y = jax.lax.map(one_head, operands)  # [B*H L/block D block]
    return from_bits(y.swapaxes(2, 3).reshape(B, H, L, D).swapaxes(1, 2))
