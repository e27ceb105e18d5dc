"""sdjax.ops.winograd against the formula in double precision, and where convolutions in float32 use it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracle import assert_close, normal

from sdjax.ops import winograd
from sdjax.ops.convolution import convolution, convolution_of_doubled, plain

SAME, UP = ((1, 1), (1, 1)), ((1, 0), (0, 1))
TAPS = sorted(winograd.TRANSFORMS)


@pytest.mark.parametrize("r", TAPS)
def test_the_transforms_are_those_of_a_convolution(r):
    of_result, of_image, of_kernel = map(np.array, winograd.TRANSFORMS[r])
    x, k = normal(r + 1).astype(np.float64), normal(r, seed=1).astype(np.float64)
    np.testing.assert_allclose(of_result @ ((of_kernel @ k) * (of_image @ x)), np.correlate(x, k), atol=1e-13)


def operands(batch, height, width, r, channels=(12, 20), dtype=jnp.float32):
    x = jnp.asarray(normal(batch, height, width, channels[0]), dtype)
    return x, jnp.asarray(normal(r, r, *channels, seed=1) / (channels[0] * r**2) ** 0.5, dtype)


def exact(x, kernel, padding):
    x, kernel = (torch.from_numpy(np.asarray(a, np.float64)) for a in (x, kernel))
    (top, bottom), (left, right) = padding
    x = torch.nn.functional.pad(x.permute(0, 3, 1, 2), (left, right, top, bottom))
    return torch.nn.functional.conv2d(x, kernel.permute(3, 2, 0, 1)).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("r", TAPS)
@pytest.mark.parametrize("block_bytes", [2**14, winograd.BLOCK_BYTES], ids=["blocks", "one block"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2**-8)], ids=["f32", "bf16"])
def test_tiles_make_the_convolution(r, block_bytes, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(winograd, "BLOCK_BYTES", block_bytes)
    for height, width, padding in ((16, 8, SAME), (13, 18, SAME), (12, 16, UP), (5, 3, ((0, 2), (3, 0)))):
        x, kernel = operands(2, height, width, r, dtype=dtype)
        y = jax.jit(lambda x, k, padding=padding: winograd.in_tiles(x, k, (1, 1), padding))(x, kernel)
        assert y.dtype == dtype
        assert_close(y.astype(jnp.float32), exact(x, kernel, padding), tolerance)


@pytest.mark.parametrize("r", TAPS)
def test_errors_are_at_most_about_twice_those_of_the_formula(r):
    x, kernel = operands(1, 32, 32, r, channels=(256, 64))
    expected = exact(x, kernel, SAME)
    y, formula = winograd.in_tiles(x, kernel, (1, 1), SAME), plain(x, kernel, (1, 1), SAME)
    assert np.square(y - expected).mean() < 2.2**2 * np.square(formula - expected).mean()


WIDE = [  # pixels, convolution: few and many pixels, and an image that is doubled
    (12, lambda x, k: convolution(x, k, None, strides=(1, 1), padding=SAME)),
    (32, lambda x, k: convolution(x, k, None, strides=(1, 1), padding=SAME)),
    (32, lambda x, k: convolution_of_doubled(x, k, None)),
]


@pytest.mark.parametrize(("size", "f"), WIDE)
def test_wide_kernels_in_float32_are_multiplied_on_cpus(size, f):
    x, kernel = operands(1, size, size, 3, channels=(128, 256))
    compiled = jax.jit(f).lower(x, kernel).compile()
    assert "convolution(" not in compiled.as_text()
    image = np.asarray(x) if f is not WIDE[2][1] else np.asarray(x).repeat(2, axis=1).repeat(2, axis=2)
    assert_close(compiled(x, kernel), exact(image, kernel, SAME), 1e-5)


def test_gradients_are_those_of_the_formula():
    x, kernel = operands(1, 20, 20, 3, channels=(128, 256))

    def gradients(f):
        return jax.jit(jax.grad(lambda *a: (f(*a) ** 2).sum(), argnums=(0, 1)))(x, kernel)

    formula = gradients(lambda x, k: plain(x, k, (1, 1), SAME))
    for actual, expected in zip(gradients(WIDE[0][1]), formula, strict=True):
        assert_close(actual, expected, 1e-5)


def test_images_stay_on_the_devices_that_a_batch_is_split_over():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    x, kernel = operands(8, 16, 16, 3, channels=(128, 256))
    x = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P("data")))
    compiled = jax.jit(WIDE[0][1]).lower(x, kernel).compile()
    assert compiled.output_shardings.spec == jax.P("data")
    collectives = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-|collective-)", compiled.as_text())
    assert set(collectives) <= {"1,1,1,1"}  # one number of the first image
