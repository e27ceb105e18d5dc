"""Convolution on CPUs: which form, and as products of blocks of pixels."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from sdjax.ops import winograd
from sdjax.ops.bits import from_bits, to_bits
from sdjax.ops.blocks import largest_divisor, unfilled

LEAST_CHANNELS = 16  # below which a product is too narrow to pay in bfloat16
LEAST_WEIGHTS = 128 * 256  # C * N, below which neither products nor tiles pay in float32
MOST_TAPS = 9  # above which XLA's own convolution does as well
BLOCK_PIXELS = 1024  # of a block: enough for a product to run at full speed
BLOCK_BYTES = 12 * 2**20  # at most, of what a block sees: it stays in a CPU's cache
CACHED_BYTES = 8 * 2**20  # of an image that stays in a CPU's cache
FEW_FLOAT32_PIXELS = 512  # up to which products are about as fast as tiles in float32, and less to compile


def form(x: Array, kernel: Array, strides: tuple[int, int]) -> Callable[..., Array] | None:
    """What is faster than XLA's own convolution of [B H W C], [h w C N], if anything is: f(x, kernel, strides, padding)

    XLA's own is a float32 one. Products of blocks of pixels run at twice its speed in bfloat16. In float32 tiles, with
    fewer products, are faster where there are not too few pixels: every call transforms the kernel.
    """
    (h, w, C, N), pixels = kernel.shape, math.prod(x.shape[:3])
    if h * w > MOST_TAPS:
        return None
    if x.dtype == jnp.bfloat16 and min(C, N) >= LEAST_CHANNELS:
        return in_blocks
    if x.dtype == jnp.float32 and C * N >= LEAST_WEIGHTS:
        tiled = h == w and h in winograd.TRANSFORMS and strides == (1, 1) and pixels > FEW_FLOAT32_PIXELS
        return winograd.in_tiles if tiled else in_blocks
    return None


def in_blocks(
    x: Array, kernel: Array, strides: tuple[int, int], padding: tuple[tuple[int, int], tuple[int, int]]
) -> Array:
    """The convolution of [B H W C], [h w C N] -> [B H' W' N], block after block of the result.

    Of each of h rows a pixel sees w * C neighbouring numbers. Where the image stays in the cache those of all rows are
    joined for one product, [pixels h*w*C] by [h*w*C N]; else a product for each row of the kernel has less to copy.
    """
    (h, w, C, N), (s, t) = kernel.shape, strides
    padded = jnp.pad(to_bits(x), ((0, 0), *padding, (0, 0)))
    B, rows, columns, _ = padded.shape
    H, W = (rows - h) // s + 1, (columns - w) // t + 1
    together = h if padded.size * x.dtype.itemsize <= CACHED_BYTES else 1  # rows of the kernel
    kernels = [from_bits(part) for part in to_bits(kernel).reshape(h // together, together * w * C, N)]

    def fill(block: Array, y: Array) -> Array:
        pixels = block * size + jnp.arange(size)
        starts = jnp.stack([pixels // (H * W) * rows + pixels // W % H * s, pixels % W * t * C], axis=-1)
        image_rows = padded.reshape(B * rows, columns * C)  # here: what fills it is fast in its own shape
        numbers = jax.lax.GatherDimensionNumbers((1,), (0,), (0, 1))

        def seen(i: int) -> Array:
            return jax.lax.gather(image_rows, starts + jnp.array([i, 0]), numbers, (1, w * C), mode="promise_in_bounds")

        def product(i: int) -> Array:
            operand = jnp.concatenate([seen(i * together + j) for j in range(together)], axis=-1)
            return jnp.matmul(from_bits(operand), kernels[i], preferred_element_type=jnp.float32)

        bits = to_bits(sum(map(product, range(h // together))).astype(x.dtype))
        return jax.lax.dynamic_update_slice(y, bits, (block * size, 0))

    size = largest_divisor(B * H * W, min(BLOCK_PIXELS, BLOCK_BYTES // (h * w * C * x.dtype.itemsize)))
    y = jax.lax.fori_loop(0, B * H * W // size, fill, unfilled(to_bits(x), (B * H * W, N)))
    return from_bits(y.reshape(B, H, W, N))
