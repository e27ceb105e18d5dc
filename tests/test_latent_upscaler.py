"""The x2 latent upscaler against PyTorch diffusers: latents beside latents that are twice as large."""

from dataclasses import replace

import diffusers
import numpy as np
import oracle
import pytest
import torch
from compilations import compilations
from test_image_to_image import CALL, SEEDS, generators, picture

import sdjax
from sdjax import batch
from sdjax.checkpoints.errors import CheckpointError
from sdjax.checkpoints.folder import variables
from sdjax.models import ControlNetModel, LatentUpscaler
from sdjax.models.latent_upscaler import LatentUpscalerConfig, larger, smaller

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' schedulers
WIDTHS = (32, 64, 64)
UNET = {
    "sample_size": 8,
    "in_channels": 8,
    "out_channels": 5,
    "block_out_channels": WIDTHS,
    "layers_per_block": (2, 1, 2),
    "down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
    "up_block_types": ("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
    "mid_block_type": None,
    "norm_num_groups": None,
    "act_fn": "gelu",
    "attention_head_dim": 8,
    "cross_attention_dim": 24,
    "time_cond_proj_dim": 128 + 24,
    "time_embedding_type": "fourier",
    "timestep_post_act": "gelu",
    "resnet_time_scale_shift": "scale_shift",
    "conv_in_kernel": 1,
    "conv_out_kernel": 1,
}
UPSCALER = replace(oracle.SD2, unet=UNET, prediction_type="sample", scheduler=diffusers.EulerDiscreteScheduler)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latent_upscaler")
    parts = oracle.pipeline(folder, UPSCALER).components
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    theirs = diffusers.StableDiffusionLatentUpscalePipeline(**{name: parts[name] for name in names})
    theirs.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def ours(folder):
    return sdjax.StableDiffusionPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    return oracle.opened(folder, diffusers.StableDiffusionLatentUpscalePipeline)


@pytest.mark.parametrize("widths", [WIDTHS, (32, 32, 64, 64)])
def test_unet(widths, tmp_path):
    more = len(widths) - len(WIDTHS)
    kinds = {name: (*UNET[name][:1] * more, *UNET[name]) for name in ("up_block_types", "layers_per_block")}
    kinds["down_block_types"] = (*UNET["down_block_types"], *UNET["down_block_types"][-1:] * more)
    reference = oracle.unet({**UNET, "block_out_channels": widths, **kinds})
    reference.save_pretrained(tmp_path)
    model = LatentUpscaler.from_pretrained(tmp_path)
    sample, t, texts = oracle.normal(2, 16, 24, 8), np.float32([0.3, -1.2]), oracle.normal(2, 7, 24, seed=1)
    pooled = oracle.normal(2, 24, seed=2)
    condition = np.concatenate([np.ones((2, 64)), np.zeros((2, 64)), pooled], axis=1, dtype=np.float32)
    given = (oracle.nchw(sample), *map(torch.from_numpy, (t, texts)))
    expected = oracle.nhwc(reference(*given, timestep_cond=torch.from_numpy(condition)).sample)
    made = oracle.run(model, sample, t, texts, text_embeds=pooled)
    oracle.assert_close(-np.asarray(made), expected[..., :-1])


def test_the_published_config_gives_the_parameters_of_the_checkpoint():
    """Names and sizes, without memory for them."""
    published = {**UNET, "block_out_channels": (384, 384, 768, 768), "layers_per_block": (2, 4, 4, 4)}
    published |= {"attention_head_dim": 64, "cross_attention_dim": 768, "time_cond_proj_dim": 896}
    for name in ("down_block_types", "up_block_types"):
        published[name] = (UNET[name][0], UNET[name][1], *UNET[name][1:])
    with torch.device("meta"):
        reference = diffusers.UNet2DConditionModel.from_config(published).state_dict()
    model = LatentUpscaler.described(LatentUpscalerConfig.from_dict(published), np.float32)
    sizes = {name: leaf.size for name, leaf in variables(model).items()}
    assert sizes == {name: value.numel() for name, value in reference.items()}


def test_sizes_are_changed_as_in_pytorch():
    from diffusers.models.downsampling import KDownsample2D
    from diffusers.models.upsampling import KUpsample2D

    x = oracle.normal(2, 6, 4, 3)
    for ours, theirs in ((smaller, KDownsample2D()), (larger, KUpsample2D())):
        oracle.assert_close(ours(x), oracle.nhwc(theirs(oracle.nchw(x))))


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 0.0}])
def test_pictures_are_those_of_pytorch(ours, theirs, options):
    """Of an odd size, which is rounded down: in diffusers to the VAE's factor, here to what the UNet takes."""
    both = CALL | {"prompt": ["a goose", "blue"], "image": [picture(1, 13, 9), picture(2, 13, 9)]} | options
    expected = theirs(generator=generators(), **both).images
    made = ours(seed=SEEDS, noise="torch", **both).images
    assert made.shape == (2, 16, 24, 3)
    oracle.assert_close(made, expected, 1e-4)


def test_latents_are_enlarged(ours, theirs):
    latents = oracle.normal(2, 4, 6, 4)
    both = CALL | {"prompt": ["a goose", "blue"]}
    expected = theirs(generator=generators(), image=oracle.nchw(latents), **both).images
    made = ours(seed=SEEDS, noise="torch", image=latents, **both).images
    oracle.assert_close(made, expected, 1e-4)


def test_other_samplers(ours):
    """The network's output is a velocity to all of them: DDIM's steps are Euler's. PyTorch's takes Euler alone."""
    call = CALL | {"prompt": "a goose", "image": picture(1, 12, 8), "seed": 1, "timestep_spacing": "leading"}
    euler, ddim = (ours(scheduler=name, **call).images for name in ("euler", "ddim"))
    oracle.assert_close(ddim, euler, 0.02)


def test_pictures_compile_nothing_and_a_saved_pipeline_is_pytorchs(ours, tmp_path):
    call = CALL | {"prompt": ["a goose", "blue"]}
    ours(image=[picture(i, 12, 8) for i in (1, 2)], seed=SEEDS, noise="torch", **call)
    with compilations() as compiled:
        made = ours(image=[picture(i, 12, 8) for i in (3, 4)], seed=SEEDS, noise="torch", **call).images
    assert compiled == []
    ours.save_pretrained(tmp_path)
    again = oracle.opened(tmp_path, diffusers.StableDiffusionLatentUpscalePipeline)
    expected = again(image=[picture(i, 12, 8) for i in (3, 4)], generator=generators(), **call).images
    oracle.assert_close(made, expected, 1e-4)


def test_a_job(folder, tmp_path):
    picture(1, 12, 8).save(tmp_path / "small.png")
    line = {"prompt": "a goose", "image": str(tmp_path / "small.png"), "num_inference_steps": 3, "seed": [1, 2]}
    batch.run([line], tmp_path / "out", model=str(folder), batch=2)
    assert len(list((tmp_path / "out").rglob("*.png"))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "this UNet makes pictures larger: give image"),
        ({"width": 32}, "width: 24, where a picture of 12x8 is made 2 times as large"),
        ({"image": picture(1, 12, 3)}, "image: a picture of 12x3 is too small: 4x4 is the least"),
        ({"image": oracle.normal(1, 3, 4, 4)}, "height must be a positive multiple of 8, not 12"),
        ({"noise_level": 20}, "noise_level: only with"),
        ({"strength": 0.5}, "strength: only with image"),
        ({"cache_interval": 2}, "cache_interval: not with the x2 latent upscaler"),
        ({"pag_scale": 2.0}, "pag_scale: not with the x2 latent upscaler"),
        ({"original_size": (8, 8)}, "original_size: only SDXL"),
    ],
)
def test_bad_arguments(ours, arguments, message):
    given = {"image": picture(1, 12, 8)} if arguments else {}
    with compilations() as compiled, pytest.raises(ValueError, match=message):
        ours("a goose", **CALL | given | arguments)
    assert compiled == []


def test_no_controls(folder):
    control = ControlNetModel.from_config({"block_out_channels": (32,), "down_block_types": ("DownBlock2D",)})
    with pytest.raises(CheckpointError, match="controlnet: not with the x2 latent upscaler"):
        sdjax.StableDiffusionPipeline.from_pretrained(folder, controlnet=control)
