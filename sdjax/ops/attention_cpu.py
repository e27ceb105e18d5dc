"""Attention on CPUs, in blocks of queries."""

import math

import jax
import jax.numpy as jnp
from jax import Array

BLOCK = 512  # queries at a time: their scores stay in a CPU's cache
LEAST_BLOCK, LEAST_TOKENS = 64, 1024  # below which blocks do not pay


def pays(q: Array, k: Array) -> bool:
    """Whether blocks are worth while for [B Lq H D] and [B Lk H D]."""
    return k.shape[1] >= LEAST_TOKENS and math.gcd(q.shape[1], BLOCK) >= LEAST_BLOCK


def in_blocks(q: Array, k: Array, v: Array) -> Array:
    """softmax(q k^T / sqrt(D)) v, head by head: [B Lq H D], [B Lk H D], [B Lk H D] -> [B Lq H D]"""
    B, L, H, D = q.shape
    block = math.gcd(L, BLOCK)
    q, k, v = (x.swapaxes(1, 2).reshape(B * H, x.shape[1], D) for x in (q, k, v))

    def one_head(qkv: tuple[Array, Array, Array]) -> Array:
        q, k, v = qkv

        def one_block(q: Array) -> Array:
            scores = jnp.einsum("qd,kd->qk", q, k, preferred_element_type=jnp.float32) * D**-0.5
            weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
            return jnp.einsum("qk,kd->qd", weights, v, preferred_element_type=jnp.float32).astype(q.dtype)

        return jax.lax.map(one_block, q.reshape(L // block, block, D)).reshape(L, D)

    return jax.lax.map(one_head, (q, k, v)).reshape(B, H, L, D).swapaxes(1, 2)
