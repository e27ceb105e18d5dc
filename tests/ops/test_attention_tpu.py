"""The kernel for TPUs against PyTorch: interpreted on a CPU, and lowered for TPUs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, PartitionSpec
from oracle import assert_close, normal

from sdjax.ops import attention_tpu
from sdjax.ops.attention import attention


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(attention_tpu, "call_kernel", partial(attention_tpu.call_kernel, interpret=True))


@pytest.fixture
def small_blocks(monkeypatch):
    """As many blocks for a few hundred tokens as there are for many thousands."""
    monkeypatch.setattr(attention_tpu, "QUERIES", 128)
    monkeypatch.setattr(attention_tpu, "KEYS", 256)
    monkeypatch.setattr(attention_tpu, "BLOCK", 640 * 16 * 4)


def inputs(queries: int, keys: int, heads: int, width: int) -> tuple[np.ndarray, ...]:
    return tuple(normal(2, tokens, heads, width, seed=i) for i, tokens in enumerate((queries, keys, keys)))


def pytorchs(*qkv: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(*(x.swapaxes(1, 2) for x in qkv)).swapaxes(1, 2)


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "width"),
    [
        (256, 256, 2, 16),  # one block of keys, read at once
        (300, 77, 2, 40),  # queries that do not fill their last block
        (128, 600, 1, 16),  # one block of keys, the last chunk of which is smaller
        (130, 1920, 1, 16),  # three blocks of keys
    ],
)
def test_the_kernel_is_pytorchs_attention(interpreted, small_blocks, queries, keys, heads, width):
    qkv = inputs(queries, keys, heads, width)
    assert attention_tpu.serves(*qkv[:2])
    assert_close(attention_tpu.flash(*map(jnp.asarray, qkv)), pytorchs(*map(torch.from_numpy, qkv)))


def test_scores_that_overflow_an_exponential_are_no_trouble_from_block_to_block(interpreted, small_blocks):
    q, k, v = inputs(128, 1920, 1, 16)
    k *= np.linspace(1, 300, 1920, dtype=np.float32)[:, None, None]  # the highest score rises with every chunk
    assert_close(attention_tpu.flash(q, k, v), pytorchs(*map(torch.from_numpy, (q, k, v))), 1e-4)


def test_its_softmax_of_bfloat16_inputs_is_float32(interpreted, small_blocks):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs(128, 600, 2, 16))
    result = attention_tpu.flash(4 * q, k, v)
    exact = pytorchs(*(torch.from_numpy(np.array(x, np.float32)) for x in (4 * q, k, v)))
    assert result.dtype == jnp.bfloat16
    assert_close(result.astype(jnp.float32), exact, 2**-7)


def test_its_gradient_is_pytorchs(interpreted):
    qkv = inputs(64, 77, 2, 8)
    theirs = [torch.from_numpy(x).requires_grad_() for x in qkv]
    pytorchs(*theirs).square().sum().backward()
    gradients = jax.jit(jax.grad(lambda *x: (attention_tpu.flash(*x) ** 2).sum(), argnums=(0, 1, 2)))(*qkv)
    for gradient, theirs_too in zip(gradients, theirs, strict=True):
        assert_close(gradient, theirs_too.grad, 1e-4)


def test_it_is_mapped_scanned_and_sharded(interpreted):
    q, k, v = inputs(64, 77, 2, 8)
    expected = pytorchs(*map(torch.from_numpy, (q, k, v)))
    mapped = jax.jit(jax.vmap(attention_tpu.flash, in_axes=(0, 0, None)))(q[:, None], k[:, None], v[:1])
    assert_close(mapped[0, 0], expected[0])
    scanned = jax.jit(lambda *x: jax.lax.scan(lambda _, y: (None, attention_tpu.flash(*y)), None, x)[1])
    assert_close(scanned(*(x[:, None] for x in (q, k, v)))[:, 0], expected)
    mesh, data = Mesh(np.array(jax.devices()[:2]), ("data",)), PartitionSpec("data")
    sharded = jax.shard_map(attention_tpu.flash, mesh=mesh, in_specs=data, out_specs=data, check_vma=False)
    assert_close(jax.jit(sharded)(q, k, v), expected)


def kernels(queries: int, keys: int, heads: int, width: int, dtype: str, platform: str = "tpu") -> int:
    """How many kernels the program for a TPU has."""
    q, k = (jax.ShapeDtypeStruct((2, tokens, heads, width), dtype) for tokens in (queries, keys))
    with jax.default_matmul_precision("default"):
        return (
            jax.jit(attention).trace(q, k, k).lower(lowering_platforms=(platform,)).as_text().count("tpu_custom_call")
        )


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "width"),
    [
        (4096, 4096, 8, 40),  # SD 1 at 512 x 512
        (1024, 1024, 8, 80),
        (64, 64, 8, 160),
        (4096, 77, 8, 40),
        (256, 77, 8, 160),
        (1600, 1600, 10, 64),  # SDXL at 640 x 640
        (4096, 4096, 1, 512),  # the autoencoder at 512 x 512
        (16384, 16384, 1, 512),  # and at 1024 x 1024
    ],
)
def test_the_attention_of_stable_diffusion_has_a_kernel(queries, keys, heads, width):
    assert kernels(queries, keys, heads, width, "bfloat16") == 1


def test_what_the_kernel_does_not_read_has_none():
    assert not kernels(1024, 1024, 8, 36, "bfloat16")  # 36 are no whole sublanes
    assert not kernels(1024, 1024, 8, 40, "float16")
    assert not kernels(7744, 7744, 1, 512, "bfloat16")  # the keys come in no blocks
    assert not kernels(1024, 1024, 8, 40, "bfloat16", platform="cpu")


@pytest.mark.parametrize("wanted", ["default", "high", "highest"])
def test_every_precision_of_jax_has_a_kernel(wanted):
    with jax.default_matmul_precision(wanted):
        assert kernels(1024, 1024, 8, 80, "float32") == 1
