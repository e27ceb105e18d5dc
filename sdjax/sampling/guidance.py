"""Guidance: the predictions of several branches combined to one. Pure JAX."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Model = Callable[[Array, Array, Array], Array]
"""f(scaled x [B ...], t [B], guidance [B]) -> prediction [B ...]; guidance: how much of it acts in this row, 1 or 0"""


def classifier_free_guidance(
    predict: Callable[[Array, Array, Any], Array],
    conditions: Sequence[Any],
    guidance_scale: Array,
    guidance_rescale: Array | None = None,
) -> Model:
    """f(x, t) = u + g (c - u), u and c being the predictions without and with the prompt (arXiv:2207.12598, eq. 6).

    predict(x, t, condition) -> predictions of x with the negative prompt, then those of x with the prompt [2B ...];
    conditions: of the negative prompt and of the prompt, each an array or a tree of arrays [B ...], which predict has
    one after the other; guidance_scale: g [B], 1 where the row has no guidance. With the prompt's condition alone there
    is no guidance: f(x, t) = predict(x, t, c) [B ...].
    guidance_rescale: r [B], f <- r std(c) / std(f) f + (1 - r) f (arXiv:2305.08891, eq. 15 and 16).
    """
    if len(conditions) == 1:
        return lambda x, t, _: predict(x, t, conditions[0])
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts), *conditions)

    def f(x: Array, t: Array, guidance: Array) -> Array:
        u, c = jnp.split(predict(x, t, both).astype(jnp.float32), 2)
        guided = u + over(guidance * guidance_scale + (1 - guidance), u) * (c - u)
        return guided if guidance_rescale is None else _rescaled(guided, c, guidance_rescale)

    return f


def _rescaled(guided: Array, c: Array, amount: Array) -> Array:
    axes = tuple(range(1, c.ndim))
    matched = guided * (c.std(axes, keepdims=True) / guided.std(axes, keepdims=True))
    amount = over(amount, c)
    return jnp.where(amount == 0, guided, amount * matched + (1 - amount) * guided)


def over(coefficient: Array, x: Array) -> Array:
    """A coefficient per image, shaped to multiply x: [B] -> [B 1 1 1]"""
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))
