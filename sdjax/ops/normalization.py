"""Group normalisation: one function, in the form that suits the platform."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from sdjax.ops.bits import from_bits, to_bits
from sdjax.ops.blocks import largest_divisor
from sdjax.ops.platform import by_platform

LEAST_ELEMENTS = 2**21  # of an image: fewer are in a CPU's cache from one pass to the next
BLOCK_ELEMENTS = 2**18


def group_norm(x: Array, scale: Array, bias: Array, *, groups: int, eps: float) -> Array:
    """(x - mean) / sqrt(var + eps) * scale + bias over groups of channels: [B H W C], [C], [C] -> [B H W C]

    Statistics are float32, the variance exact (two passes). They are taken over pixels first, then over the channels of
    a group: on CPUs several times faster than over both at once. There large images are read in blocks of pixels, so
    that no float32 copy of a bfloat16 one is made.
    """
    forms = {"cpu": partial(_in_blocks, groups=groups, eps=eps)} if math.prod(x.shape[1:]) >= LEAST_ELEMENTS else {}
    return by_platform(forms, partial(plain, groups=groups, eps=eps), x, scale, bias)


def plain(x: Array, scale: Array, bias: Array, *, groups: int, eps: float) -> Array:
    """`group_norm` by its formula."""
    centred = x.astype(jnp.float32)
    centred -= _over_groups(centred.mean((1, 2)), groups)
    scale = jax.lax.rsqrt(_over_groups((centred**2).mean((1, 2)), groups) + eps) * scale
    return (centred * scale + bias).astype(x.dtype)


def _in_blocks(x: Array, scale: Array, bias: Array, *, groups: int, eps: float) -> Array:
    x = jax.lax.optimization_barrier(x)  # else XLA takes what x was before it was rounded, and keeps both
    B, H, W, C = x.shape
    rows = largest_divisor(H, BLOCK_ELEMENTS // (W * C))

    def one_block(pixels: Array) -> tuple[Array, Array]:
        pixels = from_bits(pixels).astype(jnp.float32)
        mean = pixels.mean(0)
        return mean, ((pixels - mean) ** 2).mean(0)

    means, variances = jax.lax.map(one_block, to_bits(x).reshape(B * H // rows, rows * W, C))
    means, variances = (a.reshape(B, H // rows, C) for a in (means, variances))
    mean = _over_groups(means.mean(1), groups)
    spread = (means - mean[:, 0]) ** 2  # of blocks and channels around their group: var = E var_i + E (mean_i - mean)^2
    scale = jax.lax.rsqrt(_over_groups((variances + spread).mean(1), groups) + eps) * scale
    return ((x.astype(jnp.float32) - mean) * scale + bias).astype(x.dtype)


def _over_groups(x: Array, groups: int) -> Array:
    """The mean of each channel's group: [B C] -> [B 1 1 C]"""
    means = x.reshape(len(x), groups, -1).mean(-1, keepdims=True)
    return jnp.repeat(means, x.shape[1] // groups, axis=-1).reshape(len(x), 1, 1, -1)
