"""sdjax.models.attention against the same blocks of PyTorch diffusers."""

import pytest
import torch
from diffusers.models import attention as reference_attention
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from oracle import assert_close, nchw, nhwc, normal, ported, randomised, run

from sdjax.models import attention


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
    assert_close(run(block, x, attention.Context(context)), expected)


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
    assert_close(run(block, x, attention.Context(context)), nhwc(expected))
