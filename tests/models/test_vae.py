"""sdjax.models.vae against PyTorch diffusers: its blocks, and whole autoencoders."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from diffusers.models.unets import unet_2d_blocks as reference_blocks
from flax import nnx
from oracle import SD1, SD2, assert_close, nchw, nhwc, normal, ported, randomised, run
from safetensors.torch import load_file, save_file

from sdjax.checkpoints.errors import CheckpointError
from sdjax.models import AutoencoderKL, AutoencoderKLConfig, DiagonalGaussian, vae

RESNETS = {"resnet_groups": 4, "resnet_eps": 1e-6}
encode, decode = nnx.jit(AutoencoderKL.encode), nnx.jit(AutoencoderKL.decode)


@pytest.mark.parametrize("resize", ["down", None])
def test_encoder_block(resize):
    reference = randomised(
        reference_blocks.DownEncoderBlock2D(
            8, 12, num_layers=2, add_downsample=resize is not None, downsample_padding=0, **RESNETS
        )
    )
    block = ported(lambda **kw: vae.Block(8, 12, 2, resize=resize, groups=4, **kw), reference)
    x = normal(2, 6, 7, 8)
    assert_close(run(block, x), nhwc(reference(nchw(x))))


@pytest.mark.parametrize("resize", ["up", None])
def test_decoder_block(resize):
    reference = randomised(
        reference_blocks.UpDecoderBlock2D(8, 12, num_layers=2, add_upsample=resize is not None, **RESNETS)
    )
    block = ported(lambda **kw: vae.Block(8, 12, 2, resize=resize, groups=4, **kw), reference)
    x = normal(2, 3, 4, 8)
    assert_close(run(block, x), nhwc(reference(nchw(x))))


@pytest.mark.parametrize("add_attention", [True, False])
def test_mid_block(add_attention):
    reference = randomised(
        reference_blocks.UNetMidBlock2D(
            8, temb_channels=None, attention_head_dim=8, add_attention=add_attention, **RESNETS
        )
    )
    block = ported(lambda **kw: vae.MidBlock(8, add_attention=add_attention, groups=4, **kw), reference)
    x = normal(2, 3, 4, 8)
    assert_close(run(block, x), nhwc(reference(nchw(x))))


CONFIGS = {
    "sd1": SD1.vae,
    "sd2": SD2.vae,
    "no quant conv": {**SD2.vae, "use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 3},
    "one level": {
        **SD2.vae,
        "block_out_channels": (8,),
        "layers_per_block": 2,
        "mid_block_add_attention": False,
        "in_channels": 4,
        "out_channels": 2,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_encode_and_decode(tmp_path, name):
    reference = oracle.vae(CONFIGS[name])
    reference.save_pretrained(tmp_path)
    model = AutoencoderKL.from_pretrained(tmp_path)
    factor = model.config.factor
    assert factor == 2 ** (len(reference.config.block_out_channels) - 1)

    images = normal(2, 5 * factor - 1, 6 * factor, reference.config.in_channels)  # the last rows are cut off
    posterior, expected = encode(model, images), reference.encode(nchw(images)).latent_dist
    assert posterior.mean.shape == (2, 4, 6, reference.config.latent_channels)
    assert_close(posterior.mean, nhwc(expected.mean))
    assert_close(posterior.logvar, nhwc(expected.logvar))
    np.testing.assert_array_equal(posterior.mode(), posterior.mean)

    latents = normal(2, 4, 6, reference.config.latent_channels)
    pictures = nhwc(reference.decode(nchw(latents)).sample)
    assert pictures.shape == (2, 4 * factor, 6 * factor, reference.config.out_channels)
    assert_close(decode(model, latents), pictures)


def test_samples_have_the_mean_and_the_variance_of_the_posterior():
    mean, logvar = jnp.float32([-3.0, 0.0, 5.0]), jnp.float32([-2.0, 0.0, 2.0])
    shape = (100_000, 3)
    posterior = DiagonalGaussian(jnp.broadcast_to(mean, shape), jnp.broadcast_to(logvar, shape))
    samples = np.asarray(posterior.sample(jax.random.normal(jax.random.key(0), shape)))
    np.testing.assert_allclose(samples.mean(0), mean, atol=0.05)
    np.testing.assert_allclose(samples.std(0), np.exp(logvar / 2), rtol=0.02)


def test_the_log_variance_is_clipped(tmp_path):
    reference = oracle.vae(SD2.vae)
    reference.quant_conv.bias[4:6] = 100
    reference.quant_conv.bias[6:] = -100
    reference.save_pretrained(tmp_path)
    posterior = encode(AutoencoderKL.from_pretrained(tmp_path), normal(2, 9, 12, 3))
    np.testing.assert_array_equal(np.unique(posterior.logvar), [-30, 20])
    assert np.isfinite(posterior.sample(normal(*posterior.mean.shape))).all()


def test_the_names_of_attention_in_old_checkpoints(tmp_path):
    """Published SD 1 VAEs say query, key, value and proj_attn."""
    oracle.vae(SD1.vae).save_pretrained(tmp_path)
    expected = nnx.to_pure_dict(nnx.state(AutoencoderKL.from_pretrained(tmp_path)))
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(path)
    for new, old in old_names.items():
        tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
    assert sum(".query." in name for name in tensors) == 4
    save_file(tensors, path)
    jax.tree.map(
        np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(AutoencoderKL.from_pretrained(tmp_path))), expected
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents_mean": [0.0, 0.1]}, r"latents_mean=\(0.0, 0.1\)"),
        ({"shift_factor": 0.1}, "shift_factor=0.1"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "down_block_types='AttnDownEncoderBlock2D'"),
        ({"down_block_types": ["DownEncoderBlock2D"]}, "entry for each level.*'down_block_types': 1"),
    ],
)
def test_what_is_not_implemented_is_named(changes, message):
    config = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    with pytest.raises(CheckpointError, match=message):
        AutoencoderKL.from_config(SD2.vae | config | changes)


def test_the_whole_config_of_diffusers_is_understood():
    config = AutoencoderKLConfig.from_dict(dict(oracle.vae(SD1.vae).config))
    assert config.factor == 4
    assert config.scaling_factor == 0.18215
