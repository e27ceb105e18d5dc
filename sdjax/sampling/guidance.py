"""Guidance: the predictions of several branches combined to one. Pure JAX."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Model = Callable[[Array, Array], Array]
"""f(scaled x [B ...], t [B]) -> predictions [N*B ...], those of the N branches one after the other"""


class Clean(NamedTuple):
    """What a prediction f [B ...] says of the clean sample: x0 = of_x + times * f."""

    of_x: Array
    """[B ...]"""
    times: Array
    """[B]"""


Guide = Callable[[Array, Array, Clean], Array]
"""(predictions [N*B ...], times [B], clean) -> the prediction [B ...] of a row; times: see `Table.guidance`"""


def unguided(prediction: Array, times: Array, clean: Clean | None = None) -> Array:
    """The prediction of a single branch, as it is."""
    return prediction


def text_weights(guidance_scale: Array) -> Array:
    """Classifier-free guidance: weights [B 2] of the negative prompt and the prompt, 1 - g and g (arXiv:2207.12598)."""
    return jnp.stack([1 - guidance_scale, guidance_scale], axis=1)


def weighted(
    weights: Array,
    rescale: Array | None = None,
    perpendicular: Array | None = None,
    mimic: Array | None = None,
) -> Guide:
    """The guide to sum_n w_n f_n, float32, of the predictions f_n of N branches.

    weights: w [B N]. Rows without guidance take the last branch's prediction, the prompt's.
    perpendicular: q [B], f <- f - q (f_2 - f_1 without its projection on f_N - f_1): Perp-Neg, arXiv:2304.04968.
    mimic: (ratio, q) [B 2]: where ratio > 0, x0 of f is made as large as that of f_1 + ratio (f - f_1): `_mimicked`.
    rescale: r [B], f <- r std(f_N) / std(f) f + (1 - r) f (arXiv:2305.08891, eq. 15 and 16).
    Then rows with k times the guidance take f <- k f + (1 - k) f_1, f_1 that of no prompt or of the negative one.
    """
    B, N = weights.shape

    def guide(predictions: Array, times: Array, clean: Clean | None = None) -> Array:
        *others, last = predictions.astype(jnp.float32).reshape(N, B, *predictions.shape[1:])
        w = jnp.where(times[:, None] > 0, weights, jnp.arange(N) == N - 1)
        # of differences, which are small where the weights are large
        guided = over(w.sum(axis=1), last) * last
        for n, other in enumerate(others):
            guided += over(w[:, n], last) * (other - last)
        if perpendicular is not None:
            u, negative, *_ = others
            q = jnp.where(times > 0, perpendicular, 0)
            guided -= over(q, last) * _perpendicular(negative - u, last - u)
        if mimic is not None:
            ratio = over(jnp.where(times > 0, mimic[:, 0], 0), last)
            like = others[0] + ratio * (guided - others[0])
            guided = jnp.where(ratio > 0, _mimicked(guided, like, mimic[:, 1], clean), guided)
        if rescale is not None:
            guided = _rescaled(guided, last, rescale)
        k = over(jnp.where(times > 0, times, 1), last)
        return k * guided + (1 - k) * others[0] if others else guided

    return guide


def branched(predict: Callable[[Array, Array, Any], Array], conditions: Sequence[Any]) -> Model:
    """f(x, t) = predict(x, t, the conditions of all branches one after the other).

    predict(x [B ...], t [B], condition [N*B ...]) -> predictions [N*B ...]. conditions: of each branch an array or a
    tree of arrays [B ...].
    """
    every = jax.tree.map(lambda *parts: jnp.concatenate(parts), *conditions)
    return lambda x, t: predict(x, t, every)


def _rescaled(guided: Array, c: Array, amount: Array) -> Array:
    axes = tuple(range(1, c.ndim))
    matched = guided * (c.std(axes, keepdims=True) / guided.std(axes, keepdims=True))
    amount = over(amount, c)
    return jnp.where(amount == 0, guided, amount * matched + (1 - amount) * guided)


def _perpendicular(x: Array, to: Array) -> Array:
    """x [B ...] without its projection on `to`, of each image as a whole; all of it where `to` is 0."""
    axes = tuple(range(1, x.ndim))
    length = (to * to).sum(axes, keepdims=True)
    return x - (x * to).sum(axes, keepdims=True) / jnp.where(length > 0, length, 1) * to


def _mimicked(f: Array, like: Array, quantile: Array, clean: Clean) -> Array:
    """f [B ... C] with the x0 of f, whose values lie around their mean as far as those of the x0 of `like` do.

    mean + clip(x0 - mean, -s, s) / s * max |x0_like - mean_like|, of each channel of an image, where s is the larger of
    that maximum and the q-quantile of |x0 - mean|: the web UI's and ComfyUI's Dynamic Thresholding (CFG Scale Fix).
    """
    axes, times = tuple(range(1, f.ndim - 1)), over(clean.times, f)
    x0, x0_like = clean.of_x + times * f, clean.of_x + times * like
    mean = x0.mean(axes, keepdims=True)
    most = jnp.abs(x0_like - x0_like.mean(axes, keepdims=True)).max(axes, keepdims=True)
    values = jnp.abs(x0 - mean).reshape(len(f), -1, f.shape[-1])
    own = jax.vmap(lambda value, q: jnp.quantile(value, q, axis=0))(values, quantile)
    s = jnp.maximum(most, own.reshape(most.shape))
    limited = jnp.where(s > 0, jnp.clip(x0 - mean, -s, s) / jnp.where(s > 0, s, 1) * most, 0)
    return (mean + limited - clean.of_x) / times


def over(coefficient: Array, x: Array) -> Array:
    """A coefficient per image, shaped to multiply x: [B] -> [B 1 1 1]"""
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))
