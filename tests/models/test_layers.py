"""sdjax.models.layers against the same blocks of PyTorch diffusers."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models import resnet
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.upsampling import Upsample2D
from flax import nnx
from oracle import assert_close, nchw, nhwc, normal, ported, randomised, run

from sdjax.models import layers


@pytest.mark.parametrize("cout", [8, 12])
@pytest.mark.parametrize(("eps", "temb_channels"), [(1e-5, 16), (1e-6, None)], ids=["unet", "vae"])
def test_resnet_block(cout, eps, temb_channels):
    reference = randomised(
        resnet.ResnetBlock2D(in_channels=8, out_channels=cout, temb_channels=temb_channels, groups=4, eps=eps)
    )
    block = ported(lambda **kw: layers.ResnetBlock(8, cout, temb_channels, groups=4, eps=eps, **kw), reference)
    x, temb = normal(2, 5, 7, 8), normal(2, 16, seed=1) if temb_channels else None
    expected = reference(nchw(x), None if temb is None else torch.from_numpy(temb))
    assert_close(run(block, x, temb), nhwc(expected))


@pytest.mark.parametrize("size", [(6, 8), (7, 5)], ids=["even", "odd"])
@pytest.mark.parametrize(("padding", "pads"), [(1, ((1, 1), (1, 1))), (0, ((0, 1), (0, 1)))], ids=["unet", "vae"])
def test_downsample(size, padding, pads):
    reference = randomised(Downsample2D(8, use_conv=True, padding=padding, name="op"))
    block = ported(lambda **kw: layers.Downsample(8, pads, **kw), reference)
    x = normal(2, *size, 8)
    assert_close(run(block, x), nhwc(reference(nchw(x))))


@pytest.mark.parametrize("size", [None, (6, 10), (5, 9), (5, 10)])
def test_upsample(size):
    reference = randomised(Upsample2D(8, use_conv=True))
    block = ported(lambda **kw: layers.Upsample(8, **kw), reference)
    x = normal(2, 3, 5, 8)
    assert_close(nnx.jit(lambda m, x: m(x, size))(block, x), nhwc(reference(nchw(x), size)))


@pytest.mark.parametrize("channels", [16, 17])
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shift", [0, 1])
def test_timestep_embedding(channels, flip, shift):
    t = np.float32([0, 1, 17, 500.5, 999])
    expected = Timesteps(channels, flip_sin_to_cos=flip, downscale_freq_shift=shift)(torch.from_numpy(t))
    actual = layers.timestep_embedding(jnp.asarray(t), channels, flip_sin_to_cos=flip, freq_shift=shift)
    # 999 has 2^-14 between its float32 neighbours: the angle, and so its sine, is that uncertain
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2**-14)


def test_timestep_embedding_of_whole_numbers():
    actual = layers.timestep_embedding(jnp.arange(5), 8, flip_sin_to_cos=True, freq_shift=0)
    angles = np.arange(5)[:, None] * 10000 ** (-np.arange(4) / 4)
    assert_close(actual, np.concatenate([np.cos(angles), np.sin(angles)], axis=1))


def test_timestep_mlp():
    reference = randomised(TimestepEmbedding(8, 16))
    block = ported(lambda **kw: layers.TimestepEmbedding(8, 16, **kw), reference)
    x = normal(3, 8)
    assert_close(run(block, x), reference(torch.from_numpy(x)))


def standardised(x: np.ndarray, axes: int | tuple[int, ...]) -> np.ndarray:
    x = x.astype(np.float64)
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-6)


@pytest.mark.parametrize(
    ("dtype", "deviation", "tolerance"),
    # float32 has 2^-19 between neighbours at 30, bfloat16 has 2^-7 between neighbours at 1
    [(jnp.float32, 0.01, 2**-19 / 0.01), (jnp.bfloat16, 0.5, 2**-7)],
    ids=["float32", "bfloat16"],
)
@pytest.mark.parametrize(("norm", "axes"), [("group", (1, 2, 3)), ("layer", 3)])
def test_norms_keep_a_small_deviation_on_a_large_mean(norm, axes, dtype, deviation, tolerance):
    """Their statistics are exact and float32: with E[x^2] - E[x]^2, or in bfloat16, nothing right would be left."""
    x = jnp.asarray(30 + deviation * normal(2, 8, 8, 64), dtype)
    kw = {"eps": 1e-6, "dtype": dtype, "param_dtype": dtype, "rngs": nnx.Rngs(0)}
    module = layers.GroupNorm(64, groups=1, **kw) if norm == "group" else layers.layer_norm(64, **kw)
    assert_close(run(module, x), standardised(np.asarray(x, np.float32), axes), tolerance)
