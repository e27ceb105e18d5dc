"""sdjax.models.autoencoder_tiny against PyTorch diffusers."""

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracle import assert_close, nchw, nhwc, normal, randomised

from sdjax.checkpoints.errors import CheckpointError
from sdjax.models import AutoencoderTiny, AutoencoderTinyConfig

encode, decode = nnx.jit(AutoencoderTiny.encode), nnx.jit(AutoencoderTiny.decode)

TINY = {
    "encoder_block_out_channels": (8, 8, 8),
    "decoder_block_out_channels": (12, 12, 12),
    "num_encoder_blocks": (1, 0, 2),
    "num_decoder_blocks": (2, 1, 0),
}
CONFIGS = {
    "published": {},
    "tiny": TINY,
    "one level": {
        "encoder_block_out_channels": (8,),
        "decoder_block_out_channels": (8,),
        "num_encoder_blocks": (3,),
        "num_decoder_blocks": (1,),
        "latent_channels": 16,
        "scaling_factor": 0.5,
    },
    "four at once": {
        **TINY,
        "decoder_block_out_channels": (12, 12),
        "num_decoder_blocks": (1, 1),
        "upsampling_scaling_factor": 4,
        "in_channels": 4,
        "out_channels": 2,
    },
}


def reference_model(config):
    return randomised(diffusers.AutoencoderTiny(**config))


@pytest.mark.parametrize(("name", "factor"), [("published", 8), ("tiny", 4), ("one level", 1), ("four at once", 4)])
def test_encode_and_decode(tmp_path, name, factor):
    reference = reference_model(CONFIGS[name])
    reference.save_pretrained(tmp_path)
    model = AutoencoderTiny.from_pretrained(tmp_path)
    config = reference.config
    assert (model.config.factor, model.config.scaling_factor) == (factor, config.scaling_factor)

    images = normal(2, 5 * factor - factor // 2, 3 * factor, config.in_channels)
    latents = encode(model, images).mode()
    assert latents.shape == (2, 5, 3, config.latent_channels)
    assert_close(latents, nhwc(reference.encode(nchw(images)).latents))

    latents = 3 * normal(2, 3, 5, config.latent_channels)  # some beyond where they are bounded
    pictures = decode(model, latents)
    assert pictures.shape == (2, 3 * factor, 5 * factor, config.out_channels)
    assert_close(pictures, nhwc(reference.decode(nchw(latents)).sample))


def test_samples_of_latents_are_the_latents():
    model = AutoencoderTiny.from_config(TINY)
    posterior = encode(model, normal(1, 8, 8, 3))
    np.testing.assert_array_equal(posterior.sample(normal(*posterior.mean.shape)), posterior.mode())
    assert np.isfinite(posterior.mode()).all()


def test_bfloat16(tmp_path):
    reference = reference_model(TINY)
    reference.save_pretrained(tmp_path)
    model = AutoencoderTiny.from_pretrained(tmp_path, dtype=jnp.bfloat16)
    latents = normal(1, 4, 4, 4)
    pictures = decode(model, latents)
    assert pictures.dtype == jnp.bfloat16
    assert_close(pictures, nhwc(reference.decode(nchw(latents)).sample), 3e-2)


def test_what_is_saved_loads_in_diffusers(tmp_path):
    model = AutoencoderTiny.from_config(TINY)
    model.save_pretrained(tmp_path)
    reference, report = diffusers.AutoencoderTiny.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    latents = normal(1, 4, 4, 4)
    assert_close(decode(model, latents), nhwc(reference.requires_grad_(False).decode(nchw(latents)).sample))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "silu"}, "act_fn='silu'"),
        ({"upsample_fn": "bilinear"}, "upsample_fn='bilinear'"),
        ({"shift_factor": 0.1}, "shift_factor=0.1"),
        ({"latents_mean": [0.1, 0.2]}, r"latents_mean=\[0.1, 0.2\]"),
        ({"encoder_block_out_channels": [8, 8, 16]}, r"encoder_block_out_channels=\(8, 8, 16\).*the same width"),
        ({"num_decoder_blocks": [1, 1]}, r"decoder_block_out_channels=\(12, 12, 12\).*num_decoder_blocks=\(1, 1\)"),
        ({"upsampling_scaling_factor": 3}, "4 times smaller.*9 times larger"),
    ],
)
def test_what_is_not_implemented_is_named(changes, message):
    with pytest.raises(CheckpointError, match=message):
        AutoencoderTiny.from_config(TINY | changes)


def test_the_whole_config_of_diffusers_is_understood():
    config = dict(diffusers.AutoencoderTiny(**TINY).config)
    assert "block_out_channels" in config
    assert AutoencoderTinyConfig.from_dict(config) == AutoencoderTinyConfig(**TINY)
