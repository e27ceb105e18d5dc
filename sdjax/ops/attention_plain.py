"""Attention by its formula: the form that every other is held to."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


def plain(q: Array, k: Array, v: Array, *, causal: bool = False) -> Array:
    """softmax(q k^T / sqrt(D)) v: [B Lq H D], [B Lk H D], [B Lk H D] -> [B Lq H D]

    Scores and softmax are float32. causal: token i sees tokens 0 to i.
    """
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if causal:
        scores = jnp.where(jnp.tri(q.shape[1], k.shape[1], dtype=bool), scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v, preferred_element_type=jnp.float32).astype(q.dtype)


def with_plain_gradient(form: Callable[[Array, Array, Array], Array]) -> Callable[[Array, Array, Array], Array]:
    """A form of attention that has the gradient of `plain`, computed anew from q, k and v."""
    attention = jax.custom_vjp(form)
    attention.defvjp(lambda *qkv: (attention(*qkv), qkv), lambda qkv, gradient: jax.vjp(plain, *qkv)[1](gradient))
    return attention
