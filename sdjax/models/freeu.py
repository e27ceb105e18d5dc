"""FreeU (arXiv:2309.11497): the features on the way up made stronger, what is left from the way down smoother."""

import jax.numpy as jnp
from jax import Array

BLOCKS = 2  # the coarsest, which it changes


def freeu(x: Array, skip: Array, b: Array, s: Array) -> tuple[Array, Array]:
    """x [B h w C], skip [B h w D]: the first half of x's channels times b, the lowest frequencies of skip times s.

    b, s: for each image, [k B]. The lowest are those of -1 and 0 waves over the height and the width (eq. 4 to 6).
    """
    half = x.shape[-1] // 2
    strength = jnp.where(jnp.arange(x.shape[-1]) < half, b[: len(x), None], 1)
    spectrum = jnp.fft.fft2(skip.astype(jnp.float32), axes=(1, 2))
    lowest = [jnp.isin(jnp.arange(n), jnp.array([0, n - 1])) for n in skip.shape[1:3]]
    is_low = (lowest[0][:, None] & lowest[1])[..., None]
    more = jnp.fft.ifft2(spectrum * is_low, axes=(1, 2)).real
    smoother = skip + (s[: len(skip), None, None, None] - 1) * more
    return (strength[:, None, None] * x).astype(x.dtype), smoother.astype(skip.dtype)
