"""2D convolution: one function, in the form that suits the platform."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from sdjax.ops import convolution_cpu, convolution_tpu
from sdjax.ops.platform import by_platform
from sdjax.ops.product import product

FORMS = {"cpu": convolution_cpu.form, "tpu": convolution_tpu.form}  # platform: which form for x, kernel and strides
Padding = tuple[tuple[int, int], tuple[int, int]]
LEAST_DOUBLED_PIXELS = {"cpu": 256, "tpu": 4096}  # below which sums of weights cost more than they save


def convolution(
    x: Array, kernel: Array, bias: Array | None, *, strides: tuple[int, int], padding: Sequence[tuple[int, int]]
) -> Array:
    """sum_ij x[b, s h + i - p, t w + j - q] K[i, j] + bias: [B H W C], [h w C N], [N] -> [B H' W' N], x = 0 outside

    strides: (s, t). padding: (before, after) of rows and of columns. Sums are float32 whatever the dtype of the inputs,
    which is that of the result. A 1x1 convolution is the product that it is. On CPUs one in bfloat16, of few pixels or
    with strides is made of products of blocks of pixels, any other of tiles with fewer products (errors up to twice
    those of the formula), unless its kernel is small; on TPUs one in bfloat16 is made of a one-dimensional convolution
    for each row of the kernel.
    """
    strides, padding = tuple(strides), tuple(map(tuple, padding))
    if kernel.shape[:2] == strides == (1, 1) and padding == ((0, 0), (0, 0)):
        return product(x, kernel[0, 0], bias)
    y = (_by_platform if _forms(x, kernel, strides) else plain)(x, kernel, strides, padding)
    return y if bias is None else y + bias


def plain(x: Array, kernel: Array, strides: tuple[int, int], padding: Padding) -> Array:
    """`convolution` as XLA has it: it accumulates in float32 on every platform."""
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _forms(x: Array, kernel: Array, strides: tuple[int, int]) -> dict[str, Callable[..., Array]]:
    """platform: what it has that is better than `plain`"""
    forms = {platform: form(x, kernel, strides) for platform, form in FORMS.items()}
    return {platform: form for platform, form in forms.items() if form}


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _by_platform(x: Array, kernel: Array, strides: tuple[int, int], padding: Padding) -> Array:
    own = {"strides": strides, "padding": padding}
    forms = {platform: partial(form, **own) for platform, form in _forms(x, kernel, strides).items()}
    return by_platform(forms, partial(plain, **own), x, kernel)


@_by_platform.defjvp
def _jvp(
    strides: tuple[int, int], padding: Padding, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (x, kernel), (dx, dkernel) = primals, tangents
    tangent = plain(dx, kernel, strides, padding) + plain(x, dkernel, strides, padding)
    return _by_platform(x, kernel, strides, padding), tangent


def convolution_of_doubled(x: Array, kernel: Array, bias: Array | None) -> Array:
    """The 3x3 convolution of `doubled` x, a pixel of zeros around it: [B H W C], [3 3 C N], [N] -> [B 2H 2W N]

    On CPUs and TPUs neighbours that are equal have their weights summed, in float32: each pixel's four results are 2x2
    convolutions of x itself, with 16 products for 36.
    """
    pixels = math.prod(x.shape[:3])
    forms = {platform: _four_convolutions for platform, least in LEAST_DOUBLED_PIXELS.items() if pixels >= least}
    y = by_platform(forms, _convolution_of_copies, x, kernel)
    return y if bias is None else y + bias


def doubled(x: Array) -> Array:
    """Every pixel four times, nearest neighbour: [B H W C] -> [B 2H 2W C]"""
    B, H, W, C = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (B, H, 2, W, 2, C)).reshape(B, 2 * H, 2 * W, C)


def _convolution_of_copies(x: Array, kernel: Array) -> Array:
    return convolution(doubled(x), kernel, None, strides=(1, 1), padding=((1, 1), (1, 1)))


def _four_convolutions(x: Array, kernel: Array) -> Array:
    B, H, W, _ = x.shape

    def quarter(i: int, j: int) -> Array:
        weights = _paired(_paired(kernel.astype(jnp.float32), i, 0), j, 1).astype(kernel.dtype)
        return convolution(x, weights, None, strides=(1, 1), padding=((1 - i, i), (1 - j, j)))

    rows = [jnp.stack([quarter(i, j) for j in range(2)], axis=3) for i in range(2)]
    return jnp.stack(rows, axis=2).reshape(B, 2 * H, 2 * W, -1)


def _paired(kernel: Array, half: int, axis: int) -> Array:
    """Weights (a, b, c) as the first of two equal pixels has them, (a, b + c), or the second, (a + b, c)."""
    a, b, c = jnp.split(kernel, 3, axis)
    return jnp.concatenate([a + b, c] if half else [a, b + c], axis)
