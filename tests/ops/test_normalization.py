"""sdjax.ops.normalization against PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracle import assert_close, nchw, nhwc, normal

from sdjax.ops import normalization
from sdjax.ops.normalization import group_norm

SHAPE = (2, 12, 10, 24)


@pytest.fixture(params=["blocks", "plain"])
def form(request, monkeypatch):
    monkeypatch.setattr(normalization, "LEAST_ELEMENTS", 0 if request.param == "blocks" else 2**40)
    monkeypatch.setattr(normalization, "BLOCK_ELEMENTS", 1000)
    return request.param


def norm(x, scale, bias):
    return jax.jit(lambda *a: group_norm(*a, groups=8, eps=1e-5))(x, scale, bias)


@pytest.mark.parametrize(("mean", "std"), [(0, 1), (30, 0.01)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2**-7)], ids=["f32", "bf16"])
def test_it_is_that_of_pytorch(form, mean, std, dtype, tolerance):
    x, scale, bias = jnp.asarray(mean + std * normal(*SHAPE), dtype), normal(24, seed=1), normal(24, seed=2)
    given = nchw(np.asarray(x, np.float32)).double()
    exact = torch.nn.functional.group_norm(given, 8, torch.tensor(scale).double(), torch.tensor(bias).double(), 1e-5)
    actual = norm(x, scale, bias)
    assert actual.dtype == dtype
    # float32 has steps of 2e-6 at 30, which is 2e-4 of a standard deviation of 0.01
    assert_close(actual.astype(jnp.float32), nhwc(exact), tolerance if mean == 0 else max(tolerance, 2e-4))


def test_its_gradient_is_that_of_pytorch(form):
    x, scale, bias, seen = normal(*SHAPE), normal(24, seed=1), normal(24, seed=2), normal(*SHAPE, seed=3)
    given = [torch.tensor(a, requires_grad=True) for a in (x, scale, bias)]
    images = given[0].permute(0, 3, 1, 2)
    (
        torch.nn.functional.group_norm(images, 8, *given[1:], 1e-5).permute(0, 2, 3, 1) * torch.tensor(seen)
    ).sum().backward()
    gradients = jax.grad(lambda *a: (norm(*a) * seen).sum(), argnums=(0, 1, 2))(x, scale, bias)
    for actual, reference in zip(gradients, given, strict=True):
        assert_close(actual, reference.grad, 1e-4)


def test_large_images_are_read_in_blocks_without_a_float32_copy():
    shape = (1, 256, 256, 64)
    of = [jax.ShapeDtypeStruct(shape, jnp.bfloat16), *[jax.ShapeDtypeStruct((64,), jnp.float32)] * 2]
    compiled = jax.jit(lambda *a: group_norm(*a, groups=8, eps=1e-5)).lower(*of).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < np.prod(shape) * 2 / 2
