"""sdjax.ops.convolution and sdjax.ops.product against PyTorch's, every form against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracle import assert_close, nchw, nhwc, normal

from sdjax.ops import convolution_cpu, convolution_tpu
from sdjax.ops.convolution import convolution, convolution_of_doubled, plain
from sdjax.ops.product import product

SAME, END, NONE = ((1, 1), (1, 1)), ((0, 1), (0, 1)), ((0, 0), (0, 0))
CASES = [  # batch, height, width, size of the kernel, strides, padding: few pixels and more than a block of them
    (2, 12, 10, 3, (1, 1), SAME),
    (2, 11, 8, 3, (2, 2), SAME),
    (2, 12, 8, 3, (2, 2), END),
    (2, 12, 10, 2, (1, 2), NONE),
    (3, 34, 37, 3, (1, 1), SAME),
    (1, 70, 66, 3, (2, 2), END),
    (1, 40, 36, 2, (1, 1), ((1, 0), (0, 1))),
]


def operands(batch, height, width, size, dtype=jnp.bfloat16):
    x = jnp.asarray(normal(batch, height, width, 24), dtype)
    return x, jnp.asarray(normal(size, size, 24, 16, seed=1) / (24 * size**2) ** 0.5, dtype)


def exact(x, kernel, strides, padding):
    x, kernel = (np.asarray(a, np.float32) for a in (x, kernel))
    x = np.pad(x, ((0, 0), *padding, (0, 0)))
    weight = torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)))
    return nhwc(torch.nn.functional.conv2d(nchw(x), weight, stride=strides))


@pytest.mark.parametrize(("batch", "height", "width", "size", "strides", "padding"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2**-8)], ids=["f32", "bf16"])
def test_convolution_is_that_of_pytorch(batch, height, width, size, strides, padding, dtype, tolerance):
    x, kernel = operands(batch, height, width, size, dtype)
    actual = jax.jit(lambda x, k: convolution(x, k, None, strides=strides, padding=padding))(x, kernel)
    assert actual.dtype == dtype
    assert_close(actual.astype(jnp.float32), exact(x, kernel, strides, padding), tolerance)


@pytest.mark.parametrize(("batch", "height", "width", "size", "strides", "padding"), CASES)
@pytest.mark.parametrize("cached_bytes", [0, 2**30], ids=["a product for each row", "one product"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2**-8)], ids=["f32", "bf16"])
def test_products_of_blocks_are_the_convolution(
    batch, height, width, size, strides, padding, cached_bytes, dtype, tolerance, monkeypatch
):
    monkeypatch.setattr(convolution_cpu, "CACHED_BYTES", cached_bytes)
    x, kernel = operands(batch, height, width, size, dtype)
    actual = jax.jit(lambda x, k: convolution_cpu.in_blocks(x, k, strides, padding))(x, kernel)
    assert actual.dtype == dtype
    assert_close(actual.astype(jnp.float32), exact(x, kernel, strides, padding), tolerance)


@pytest.mark.parametrize(("batch", "height", "width", "size", "strides", "padding"), CASES)
def test_rows_of_the_kernel_one_by_one_are_the_convolution(batch, height, width, size, strides, padding):
    x, kernel = operands(batch, height, width, size)
    if convolution_tpu.form(x, kernel, strides):
        actual = convolution_tpu.in_rows(x, kernel, strides, padding)
        assert actual.dtype == x.dtype
        assert_close(actual.astype(jnp.float32), exact(x, kernel, strides, padding), 2**-8)
    lowered = jax.jit(lambda x, k: convolution(x, k, None, strides=strides, padding=padding)).trace(x, kernel)
    text = lowered.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.convolution(") == (size if strides == (1, 1) else 1)


def test_bfloat16_sums_are_float32():
    """1 and 255 times 2^-9 for each tap: 1 + 2^-9 is 1 in bfloat16, so that sums in it would lose all but the first."""
    x = jnp.full((1, 40, 40, 256), 2.0**-9, jnp.bfloat16).at[..., 0].set(1)
    kernel = jnp.ones((3, 3, 256, 16), jnp.bfloat16)
    assert convolution_cpu.form(x, kernel, (1, 1)) is convolution_cpu.in_blocks
    y = jax.jit(lambda x, k: convolution(x, k, None, strides=(1, 1), padding=SAME))(x, kernel)
    assert_close(y[0, 1:-1, 1:-1].astype(jnp.float32), np.full((38, 38, 16), 9 + 9 * 255 * 2.0**-9), 2**-8)
    y = jax.jit(product)(x, kernel[0, 0])
    assert_close(y.astype(jnp.float32), np.full((1, 40, 40, 16), 1 + 255 * 2.0**-9), 2**-8)


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[4]])
def test_gradients_are_those_of_the_plain_form(case):
    *shape, strides, padding = case
    x, kernel = operands(*shape)

    def gradients(f, *inputs):
        return jax.jit(jax.grad(lambda *a: (f(*a).astype(jnp.float32) ** 2).sum(), argnums=(0, 1)))(*inputs)

    ours = gradients(lambda x, k: convolution(x, k, None, strides=strides, padding=padding), x, kernel)
    plains = gradients(lambda x, k: plain(x, k, strides, padding), x.astype(jnp.float32), kernel.astype(jnp.float32))
    for actual, reference in zip(ours, plains, strict=True):
        assert actual.dtype == jnp.bfloat16
        assert_close(actual.astype(jnp.float32), reference, 2**-6)


@pytest.mark.parametrize("size", [(5, 7), (16, 20)], ids=["few pixels", "many"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2**-7)], ids=["f32", "bf16"])
def test_the_convolution_of_a_doubled_image_and_its_gradient(size, dtype, tolerance):
    x, kernel = operands(2, *size, 3, dtype)
    images, weight = (torch.tensor(np.asarray(a, np.float32), requires_grad=True) for a in (x, kernel))
    doubled = torch.nn.functional.interpolate(images.permute(0, 3, 1, 2), scale_factor=2.0)
    expected = torch.nn.functional.conv2d(doubled, weight.permute(3, 2, 0, 1), padding=1)
    expected.square().sum().backward()
    y = jax.jit(convolution_of_doubled)(x, kernel, None)
    assert y.dtype == dtype
    assert_close(y.astype(jnp.float32), nhwc(expected.detach()), tolerance)
    gradient = jax.grad(lambda *a: (convolution_of_doubled(*a, None).astype(jnp.float32) ** 2).sum(), argnums=(0, 1))
    for actual, reference in zip(jax.jit(gradient)(x, kernel), (images.grad, weight.grad), strict=True):
        assert_close(actual.astype(jnp.float32), reference, 4 * tolerance)


@pytest.mark.parametrize(("size", "convolutions"), [(32, 3), (64, 4 * 2)], ids=["rows of 3x3", "rows of four 2x2"])
def test_a_large_doubled_image_is_four_convolutions_on_tpus(size, convolutions):
    lowered = (
        jax.jit(convolution_of_doubled).trace(*operands(1, size, size, 3), None).lower(lowering_platforms=("tpu",))
    )
    assert lowered.as_text().count("stablehlo.convolution") == convolutions


@pytest.mark.parametrize("height", [6, 40])
def test_a_mapped_convolution_is_each_of_its_convolutions(height):
    xs, kernels = normal(3, 1, height, 36, 16), normal(3, 3, 3, 16, 16, seed=1)
    xs, kernels = (jnp.asarray(a, jnp.bfloat16) for a in (xs, kernels))

    def f(x, k):
        return convolution(x, k, None, strides=(1, 1), padding=SAME)

    each = jnp.stack([jax.jit(f)(x, k) for x, k in zip(xs, kernels, strict=True)])
    assert_close(jax.jit(jax.vmap(f))(xs, kernels).astype(jnp.float32), each.astype(jnp.float32), 2**-8)


def test_each_device_convolves_its_own_images():
    x, kernel = operands(8, 16, 16, 3)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    rows, whole = jax.P("data"), jax.P()

    def f(x, k):
        return convolution(x, k, None, strides=(1, 1), padding=SAME)

    split = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(rows, whole), out_specs=rows))(x, kernel)
    assert_close(split.astype(jnp.float32), exact(x, kernel, (1, 1), SAME), 2**-8)


def test_a_pointwise_convolution_is_a_product():
    x, kernel, bias = normal(2, 5, 7, 8), normal(1, 1, 8, 12, seed=1), normal(12, seed=2)
    y = convolution(x, kernel, bias, strides=(1, 1), padding=NONE)
    assert_close(y, x @ kernel[0, 0] + bias)


def test_products_are_what_cpus_compile_in_bfloat16():
    x, kernel = operands(1, 64, 64, 3)
    lowered = jax.jit(lambda x, k: convolution(x, k, None, strides=(1, 1), padding=SAME)).lower(x, kernel)
    assert "convolution(" not in lowered.compile().as_text()
