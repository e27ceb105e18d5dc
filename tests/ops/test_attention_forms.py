"""sdjax.ops.attention against PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracle import assert_close, normal

from sdjax.ops.attention import attention


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_that_of_pytorch(causal):
    q, k, v = normal(2, 6, 3, 8), normal(2, 6, 3, 8, seed=1), normal(2, 6, 3, 8, seed=2)
    heads_first = [torch.from_numpy(x).transpose(1, 2) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2)
    assert_close(jax.jit(attention, static_argnames="causal")(q, k, v, causal=causal), expected)


def test_scores_that_overflow_an_exponential_are_no_trouble():
    q, k, v = 100 * normal(1, 4, 1, 8), 100 * normal(1, 5, 1, 8, seed=1), normal(1, 5, 1, 8, seed=2)
    best = np.argmax(np.einsum("qd,kd->qk", q[0, :, 0], k[0, :, 0]), axis=1)
    assert_close(attention(q, k, v)[0], v[0][best])


def test_the_softmax_of_bfloat16_inputs_is_float32():
    q, k, v = (jnp.asarray(normal(1, 64, 2, 16, seed=i), jnp.bfloat16) for i in range(3))
    result = attention(4 * q, k, v)
    exact = attention(*(x.astype(jnp.float32) for x in (4 * q, k, v)))
    assert result.dtype == jnp.bfloat16
    assert_close(result.astype(jnp.float32), exact, 2**-8)


@pytest.mark.parametrize(("tokens", "context"), [(1024, 1024), (64 * 17, 1024), (1024, 1030), (4096, 77)])
def test_many_tokens_in_blocks_are_pytorchs_attention_and_gradient(tokens, context):
    q, k, v = normal(2, tokens, 2, 8), normal(2, context, 2, 8, seed=1), normal(2, context, 2, 8, seed=2)
    theirs = [torch.from_numpy(x).swapaxes(1, 2).requires_grad_() for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*theirs)
    expected.square().sum().backward()
    assert_close(jax.jit(attention)(q, k, v), expected.detach().swapaxes(1, 2))
    gradients = jax.jit(jax.grad(lambda *x: (attention(*x) ** 2).sum(), argnums=(0, 1, 2)))(q, k, v)
    for gradient, theirs_too in zip(gradients, theirs, strict=True):
        assert_close(gradient, theirs_too.grad.swapaxes(1, 2), 1e-4)


def test_bfloat16_blocks_are_the_float32_attention_and_gradient():
    inputs = [jnp.asarray(normal(1, 1024, 2, 8, seed=i), jnp.bfloat16) for i in range(3)]

    def loss(*x):
        return (attention(*x).astype(jnp.float32) ** 2).sum()

    def value_and_gradients(*x):
        return jax.jit(attention)(*x), *jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*x)

    exact = value_and_gradients(*(x.astype(jnp.float32) for x in inputs))
    for actual, reference in zip(value_and_gradients(*inputs), exact, strict=True):
        assert actual.dtype == jnp.bfloat16
        assert_close(actual.astype(jnp.float32), reference, 2**-6)


def test_blocks_are_what_cpus_compile():
    """And not the whole matrix of scores, 1024 x 1024 for each head."""
    x = jax.ShapeDtypeStruct((1, 1024, 2, 8), jnp.float32)
    text = jax.jit(attention).lower(x, x, x).compile().as_text()
    assert "1024,256]" in text
    assert "1024,1024]" not in text
