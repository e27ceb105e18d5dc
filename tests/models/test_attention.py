"""sdjax.models.attention against the same blocks of PyTorch diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models import attention as reference_attention
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from oracle import assert_close, nchw, nhwc, normal, ported, randomised, run

from sdjax.models import attention


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_that_of_pytorch(causal):
    q, k, v = normal(2, 6, 3, 8), normal(2, 6, 3, 8, seed=1), normal(2, 6, 3, 8, seed=2)
    heads_first = [torch.from_numpy(x).transpose(1, 2) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2)
    assert_close(jax.jit(attention.attention, static_argnames="causal")(q, k, v, causal=causal), expected)


def test_scores_that_overflow_an_exponential_are_no_trouble():
    q, k, v = 100 * normal(1, 4, 1, 8), 100 * normal(1, 5, 1, 8, seed=1), normal(1, 5, 1, 8, seed=2)
    best = np.argmax(np.einsum("qd,kd->qk", q[0, :, 0], k[0, :, 0]), axis=1)
    assert_close(attention.attention(q, k, v)[0], v[0][best])


def test_the_softmax_of_bfloat16_inputs_is_float32():
    q, k, v = (jnp.asarray(normal(1, 64, 2, 16, seed=i), jnp.bfloat16) for i in range(3))
    result = attention.attention(4 * q, k, v)
    exact = attention.attention(*(x.astype(jnp.float32) for x in (4 * q, k, v)))
    assert result.dtype == jnp.bfloat16
    assert_close(result.astype(jnp.float32), exact, 2**-8)


@pytest.mark.parametrize("context_channels", [None, 12], ids=["self", "cross"])
@pytest.mark.parametrize("bias", [False, True])
def test_attention_module(context_channels, bias):
    reference = randomised(
        Attention(16, cross_attention_dim=context_channels, heads=4, dim_head=4, bias=bias, out_bias=True)
    )
    block = ported(
        lambda **kw: attention.Attention(16, 4, context_channels=context_channels, qkv_bias=bias, **kw), reference
    )
    x, context = normal(2, 6, 16), normal(2, 5, 12, seed=1) if context_channels else None
    expected = reference(torch.from_numpy(x), None if context is None else torch.from_numpy(context))
    assert_close(run(block, x, context), expected)


def test_spatial_attention():
    reference = randomised(
        Attention(8, heads=2, dim_head=4, eps=1e-6, norm_num_groups=4, bias=True, residual_connection=True)
    )
    block = ported(lambda **kw: attention.SpatialAttention(8, 2, groups=4, eps=1e-6, **kw), reference)
    x = normal(2, 3, 5, 8)
    assert_close(run(block, x), nhwc(reference(nchw(x))))


def test_geglu():
    reference = randomised(GEGLU(8, 12))
    x = 3 * normal(2, 5, 8)
    assert_close(run(ported(lambda **kw: attention.GEGLU(8, 12, **kw), reference), x), reference(torch.from_numpy(x)))


def test_feed_forward():
    reference = randomised(reference_attention.FeedForward(8, activation_fn="geglu"))
    x = normal(2, 5, 8)
    assert_close(run(ported(lambda **kw: attention.FeedForward(8, **kw), reference), x), reference(torch.from_numpy(x)))


@pytest.mark.parametrize("only_cross_attention", [False, True])
def test_basic_transformer_block(only_cross_attention):
    reference = randomised(
        reference_attention.BasicTransformerBlock(
            16, 4, 4, cross_attention_dim=12, only_cross_attention=only_cross_attention
        )
    )
    block = ported(
        lambda **kw: attention.BasicTransformerBlock(16, 4, 12, only_cross_attention=only_cross_attention, **kw),
        reference,
    )
    x, context = normal(2, 6, 16), normal(2, 5, 12, seed=1)
    expected = reference(torch.from_numpy(x), encoder_hidden_states=torch.from_numpy(context))
    assert_close(run(block, x, context), expected)


@pytest.mark.parametrize("linear", [False, True], ids=["conv", "linear"])
def test_transformer(linear):
    reference = randomised(
        Transformer2DModel(
            4, 4, 16, num_layers=2, norm_num_groups=4, cross_attention_dim=12, use_linear_projection=linear
        )
    )
    block = ported(
        lambda **kw: attention.Transformer2DModel(
            16, 4, 12, layers=2, groups=4, use_linear_projection=linear, only_cross_attention=False, **kw
        ),
        reference,
    )
    x, context = normal(2, 3, 5, 16), normal(2, 5, 12, seed=1)
    expected = reference(nchw(x), encoder_hidden_states=torch.from_numpy(context), return_dict=False)[0]
    assert_close(run(block, x, context), nhwc(expected))


@pytest.mark.parametrize(("tokens", "context"), [(1024, 1024), (64 * 17, 1024), (1024, 1030)])
def test_many_tokens_in_blocks_are_pytorchs_attention_and_gradient(tokens, context):
    q, k, v = normal(2, tokens, 2, 8), normal(2, context, 2, 8, seed=1), normal(2, context, 2, 8, seed=2)
    theirs = [torch.from_numpy(x).swapaxes(1, 2).requires_grad_() for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*theirs)
    expected.square().sum().backward()
    assert_close(jax.jit(attention.attention)(q, k, v), expected.detach().swapaxes(1, 2))
    gradients = jax.jit(jax.grad(lambda *x: (attention.attention(*x) ** 2).sum(), argnums=(0, 1, 2)))(q, k, v)
    for gradient, theirs_too in zip(gradients, theirs, strict=True):
        assert_close(gradient, theirs_too.grad.swapaxes(1, 2), 1e-4)


def test_blocks_are_what_cpus_compile():
    """And not the whole matrix of scores, 1024 x 1024 for each head."""
    x = jax.ShapeDtypeStruct((1, 1024, 2, 8), jnp.float32)
    text = jax.jit(attention.attention).lower(x, x, x).compile().as_text()
    assert "512,1024]" in text
    assert "1024,1024]" not in text
