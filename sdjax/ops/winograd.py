"""Convolution with fewer products than its formula has."""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sdjax.ops.bits import from_bits, to_bits
from sdjax.ops.blocks import largest_divisor

POINTS = {2: (0, 1), 3: (0, 1, -1), 5: (0, 3 / 4, -3 / 4, 3 / 2, -3 / 2)}
BLOCK_BYTES = 16 * 2**20  # of what is multiplied at once: it stays in a CPU's cache


def has(m: int, r: int) -> bool:
    """Whether tiles of m x m results of kernels of r x r taps are made."""
    return m + r - 2 in POINTS


class Transforms(NamedTuple):
    """A [n m], B [n n], G [n r] of y = A^T ((G k) * (B x)), where y_j = sum_i k_i x_(i+j)."""

    result: np.ndarray
    image: np.ndarray
    kernel: np.ndarray


@cache
def transforms(m: int, r: int) -> Transforms:
    """Those of m results of r taps with n = m + r - 1 products, which are of values at n - 1 `POINTS` and infinity.

    Toom and Cook's algorithm, transposed: Lavin and Gray, arXiv:1509.09308, with points at which errors are small. Of
    m x m results of r x r taps they are the Kronecker products of each with itself.
    """
    points = np.array(POINTS[m + r - 2], float)
    others = [np.delete(points, i) for i in range(len(points))]
    scales = np.array([np.prod(point - rest) for point, rest in zip(points, others, strict=True)])
    infinity = np.eye(len(points) + 1)[-1]
    result = np.vstack([np.vander(points, m, increasing=True), infinity[-m:]])
    image = np.vstack([*([*np.poly(rest)[::-1], 0] for rest in others), np.poly(points)[::-1]])
    kernel = np.vstack([np.vander(points, r, increasing=True) / scales[:, None], infinity[-r:]])
    return Transforms(result, image, kernel)


def in_tiles(
    x: Array, kernel: Array, strides: tuple[int, int], padding: tuple[tuple[int, int], tuple[int, int]], *, m: int
) -> Array:
    """The convolution of [B H W C], [r r C N] -> [B H' W' N], in tiles of m x m results, some rows of tiles at a time

    A tile takes (m + r - 1)^2 products for (m r)^2, in float32 whatever the dtype of the inputs, which is that of the
    result. Errors are up to twice those of the formula in float32 with m = 2, and 4 times with m = 4. strides: (1, 1).
    """
    (B, *size, C), (r, N) = x.shape, kernel.shape[::3]
    of_result, of_image, of_kernel = (jnp.asarray(np.kron(a, a), jnp.float32) for a in transforms(m, r))
    n = m + r - 1
    H, W = (length + sum(around) - r + 1 for length, around in zip(size, padding, strict=True))
    h, w = -(-H // m), -(-W // m)
    (top, _), (left, _) = padding
    around = (top, h * m + r - 1 - size[0] - top), (left, w * m + r - 1 - size[1] - left)
    padded = jnp.pad(to_bits(x), ((0, 0), *around, (0, 0)))
    first = x[0, 0, 0, 0]
    kernel = jnp.where(
        first == first, kernel, first
    )  # waits for x: XLA would transform all of a network's at the start
    matrices = (of_kernel @ kernel.reshape(r * r, -1).astype(jnp.float32)).reshape(n * n, C, N)
    t = largest_divisor(h, BLOCK_BYTES // (B * w * n**2 * max(C, N) * 4))

    def fill(block: Array, y: Array) -> Array:
        seen = from_bits(jax.lax.dynamic_slice_in_dim(padded, block * t * m, t * m + r - 1, axis=1))
        of_tiles = [seen[:, i : i + (t - 1) * m + 1 : m, j : j + (w - 1) * m + 1 : m] for i, j in np.ndindex(n, n)]
        values = of_image @ jnp.stack(of_tiles).astype(jnp.float32).reshape(n * n, -1)
        products = jnp.matmul(values.reshape(n * n, -1, C), matrices)
        part = (of_result.T @ products.reshape(n * n, -1)).reshape(m, m, B, t, w, N)
        part = part.transpose(2, 3, 0, 4, 1, 5).reshape(B, t * m, w * m, N).astype(x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(y, to_bits(part), block * t * m, axis=1)

    unfilled = jnp.broadcast_to(to_bits(first), (B, h * m, w * m, N))  # of zeros XLA would make all before it begins
    return from_bits(jax.lax.fori_loop(0, h // t, fill, unfilled))[:, :H, :W]
