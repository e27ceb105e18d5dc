"""The model that comes with the package: its size, its pictures, and that PyTorch makes the same ones."""

import jax
import numpy as np
import oracle
import pytest
from drawings import PALETTE

import sdjax
from sdjax.runtime import parallel

STEPS = 5


@pytest.fixture(scope="module")
def pipe():
    return sdjax.StableDiffusionPipeline.from_pretrained(mesh=parallel.data_mesh(jax.devices()[:1]))


def test_weights_are_at_most_40_megabytes_in_the_standard_layout():
    files = list(sdjax.EMBEDDED_MODEL.rglob("*.safetensors"))
    assert {file.parent.name for file in files} == {"text_encoder", "unet", "vae"}
    assert sum(file.stat().st_size for file in files) <= 40e6
    assert "Microsoft" in (sdjax.EMBEDDED_MODEL / "LICENSE").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers under NumPy 2
@pytest.mark.filterwarnings("ignore::RuntimeWarning:diffusers")  # its logarithms of level 0
def test_pytorch_makes_the_same_pictures(pipe):
    import diffusers

    theirs = diffusers.StableDiffusionPipeline.from_pretrained(sdjax.EMBEDDED_MODEL, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    size, channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels
    latents = oracle.normal(4, size, size, channels)
    prompt = ["a goose on a blue background", "a red apple", "a key on a pink background", "a pizza"]
    call = {"prompt": prompt, "num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "np"}
    expected = theirs(**call, latents=oracle.nchw(latents)).images
    np.testing.assert_allclose(pipe(**call, latents=latents).images, expected, atol=2 / 255)


def test_the_background_is_the_colour_that_was_asked(pipe):
    colors = ["blue", "red", "green", "black"]
    prompts = [f"a goose on a {color} background" for color in colors]
    pictures = pipe(prompts, seed=range(1000, 1004), num_inference_steps=20, output_type="np").images
    palette = np.array(list(PALETTE.values())) / 255
    border = np.concatenate([pictures[:, 0], pictures[:, -1], pictures[:, :, 0], pictures[:, :, -1]], axis=1)
    nearest = [((palette - np.median(edge, axis=0)) ** 2).sum(1).argmin() for edge in border]
    assert [list(PALETTE)[i] for i in nearest] == colors


def test_seeds_differ_and_repeat(pipe):
    call = {"num_images_per_prompt": 4, "num_inference_steps": STEPS, "output_type": "np"}
    first, second = (pipe("a goose", seed=5, **call).images for _ in range(2))
    assert np.array_equal(first, second)
    assert min(np.abs(first[0] - other).max() for other in first[1:]) > 0.1
