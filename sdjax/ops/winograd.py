"""Convolution with fewer products than its formula has: Winograd's F(2x2, rxr), Lavin and Gray, arXiv:1509.09308."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sdjax.ops.bits import from_bits, to_bits
from sdjax.ops.blocks import largest_divisor, unfilled

BLOCK_BYTES = 16 * 2**20  # of what is multiplied at once: it stays in a CPU's cache
Matrix = tuple[tuple[float, ...], ...]


class Transforms(NamedTuple):
    """A^T [2 n], B^T [n n], G [n r] of y = A^T ((G k) * (B^T x)), where y_j = sum_i k_i x_(i+j), j < 2, n = r + 1."""

    result: Matrix
    image: Matrix
    kernel: Matrix


TRANSFORMS = {  # taps
    2: Transforms(
        result=((1, 1, 0), (0, 1, 1)),
        image=((1, -1, 0), (0, 1, 0), (0, -1, 1)),
        kernel=((1, 0), (1, 1), (0, 1)),
    ),
    3: Transforms(
        result=((1, 1, 1, 0), (0, 1, -1, -1)),
        image=((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
        kernel=((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1)),
    ),
}


def in_tiles(
    x: Array, kernel: Array, strides: tuple[int, int], padding: tuple[tuple[int, int], tuple[int, int]]
) -> Array:
    """The convolution of [B H W C], [r r C N] -> [B H' W' N], in tiles of 2x2 results, some rows of tiles at a time

    A tile takes (r + 1)^2 products for (2 r)^2, in float32 whatever the dtype of the inputs, that of the result too.
    Errors are up to twice those of the formula in float32. r: one of `TRANSFORMS`. strides: (1, 1).
    """
    (B, *size, C), (r, N) = x.shape, kernel.shape[::3]
    of_result, of_image, of_kernel = TRANSFORMS[r]
    H, W = (length + sum(around) - r + 1 for length, around in zip(size, padding, strict=True))
    h, w = (H + 1) // 2, (W + 1) // 2
    (top, _), (left, _) = padding
    around = (top, 2 * h + r - 1 - size[0] - top), (left, 2 * w + r - 1 - size[1] - left)
    padded = jnp.pad(to_bits(x), ((0, 0), *around, (0, 0)))
    first = x[0, 0, 0, 0]
    kernel = jnp.where(first == first, kernel, first)  # waits for x: XLA would transform all kernels when it begins
    columns = _applied(of_kernel, kernel.astype(jnp.float32).swapaxes(0, 1))
    matrices = [_applied(of_kernel, column) for column in columns]

    def tiles(seen: Array) -> Array:
        """[B 2t+r-1 2w+r-1 C] -> [B t 2 w 2N]"""
        rows = _applied(of_image, _neighbours(seen.astype(jnp.float32), r, axis=1))
        values = [_applied(of_image, _neighbours(row, r, axis=2)) for row in jax.lax.optimization_barrier(rows)]
        products = [map(jnp.matmul, *column) for column in zip(zip(*values, strict=True), matrices, strict=True)]
        columns = jax.lax.optimization_barrier([_applied(of_result, column) for column in products])
        rows = [jnp.concatenate(_applied(of_result, row), axis=-1) for row in zip(*columns, strict=True)]
        return jnp.stack(rows, axis=2)

    def fill(block: Array, y: Array) -> Array:
        seen = jax.lax.dynamic_slice_in_dim(padded, block * 2 * t, 2 * t + r - 1, axis=1)
        part = tiles(from_bits(seen)).reshape(B, 2 * t, 2 * w, N).astype(x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(y, to_bits(part), block * 2 * t, axis=1)

    t = largest_divisor(h, BLOCK_BYTES // (B * w * (r + 1) ** 2 * max(C, N) * 4))
    return from_bits(jax.lax.fori_loop(0, h // t, fill, unfilled(to_bits(x), (B, 2 * h, 2 * w, N))))[:, :H, :W]


def _neighbours(x: Array, r: int, axis: int) -> list[Array]:
    """Of tiles of r + 1 that are 2 apart: all first elements, all second ones, and so on."""
    last = x.shape[axis] - r - 1
    return [jax.lax.slice_in_dim(x, i, i + last + 1, 2, axis) for i in range(r + 1)]


def _applied(matrix: Matrix, parts: Iterable[Array]) -> list[Array]:
    """sum_j M_ij parts_j for all i, without the products by 0"""
    parts = list(parts)
    return [sum(c * part for c, part in zip(row, parts, strict=True) if c) for row in matrix]
