"""Scaled dot-product attention: one function, in the form that suits the platform."""

import jax
import jax.numpy as jnp
from jax import Array

from sdjax.ops import attention_cpu


def attention(q: Array, k: Array, v: Array, *, causal: bool = False) -> Array:
    """softmax(q k^T / sqrt(D)) v: [B Lq H D], [B Lk H D], [B Lk H D] -> [B Lq H D]

    Scores and softmax are float32 whatever the dtype of the inputs. causal: token i sees tokens 0 to i. On CPUs many
    tokens are read in blocks of queries, which gives the same values several times faster.
    """
    if causal or not attention_cpu.pays(q, k):
        return plain(q, k, v, causal=causal)
    return jax.lax.platform_dependent(q, k, v, cpu=attention_cpu.in_blocks, default=plain)


def plain(q: Array, k: Array, v: Array, *, causal: bool = False) -> Array:
    """`attention` as its formula says."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if causal:
        scores = jnp.where(jnp.tri(q.shape[1], k.shape[1], dtype=bool), scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v, preferred_element_type=jnp.float32).astype(q.dtype)
