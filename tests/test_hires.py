"""Pictures that are made small first, then larger, against PyTorch diffusers' two pipelines one after the other."""

import diffusers
import jax
import numpy as np
import oracle
import pytest
import safetensors.torch
import test_rrdbnet
import torch
from compilations import compilations
from PIL import Image
from test_image_to_image import CALL, SEEDS, command, generators, picture

import sdjax
from sdjax import batch, sampling
from sdjax.runtime import programs

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' schedulers
SMALL = {"height": 32, "width": 24}


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory):
    path = tmp_path_factory.mktemp("upscaler") / "esrgan.safetensors"
    safetensors.torch.save_file(test_rrdbnet.tensors(4), path)
    return path


@pytest.fixture(scope="module")
def ours(one_level_folder, upscaler):
    return sdjax.StableDiffusionPipeline.from_pretrained(one_level_folder, upscaler=upscaler)


@pytest.fixture(scope="module")
def theirs(one_level_folder):
    """Text to image, and image to image."""
    kinds = diffusers.StableDiffusionPipeline, diffusers.StableDiffusionImg2ImgPipeline
    pipes = [kind.from_pretrained(one_level_folder, safety_checker=None) for kind in kinds]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


@pytest.mark.parametrize(("name", "strength"), [("ddim", 0.5), ("euler_ancestral", 0.7)])
def test_latents_made_larger(ours, theirs, name, strength):
    scheduler = sampling.from_config(ours.scheduler.config, sampler=name)
    for pipe in theirs:
        pipe.scheduler = getattr(diffusers, scheduler.config["_class_name"]).from_config(dict(scheduler.config))
    both = CALL | {"prompt": ["a goose", "blue"]}
    first = theirs[0](generator=generators(), **SMALL, **both | {"output_type": "latent"}).images
    larger = torch.nn.functional.interpolate(first, size=(12, 9), mode="bilinear")
    expected = theirs[1](image=larger, strength=strength, generator=generators(), **both).images
    options = {"hires_scale": 1.5, "hires_strength": None if strength == 0.7 else strength}
    made = ours(seed=SEEDS, noise="torch", scheduler=scheduler, **SMALL, **both, **options).images
    assert made.shape == (2, 48, 36, 3)
    np.testing.assert_allclose(made, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["lanczos", "model"])
def test_pixels_made_larger(ours, theirs, kind):
    """By the kernel of Lanczos, or first by a network; the latents are the mode of the VAE's posterior."""
    call = CALL | {"prompt": "a goose", "scheduler": "ddim", "seed": 7}
    small = ours(**call, **SMALL).images
    x = oracle.nchw(small)
    if kind == "model":
        x = test_rrdbnet.reference(test_rrdbnet.tensors(4), x, 4)
    larger = jax.image.resize(oracle.nhwc(x), (1, 64, 48, 3), "lanczos3").clip(0, 1)
    with torch.no_grad():
        mode = theirs[0].vae.encode(oracle.nchw(np.asarray(larger) * 2 - 1)).latent_dist.mode()
    latents = oracle.nhwc(mode * theirs[0].vae.config.scaling_factor)
    expected = ours(image=latents, strength=0.6, **call).images
    made = ours(hires_scale=2, hires_strength=0.6, hires_upscaler=kind, **SMALL, **call).images
    np.testing.assert_allclose(made, expected, atol=1e-4)


def test_strengths_compile_nothing_and_vary_in_a_batch(ours):
    call = CALL | {"prompt": "a goose", "scheduler": "euler", "hires_scale": 2, "height": 16, "width": 16}
    ours(**call, seed=[1, 2])
    with compilations() as compiled:
        both = ours(**call, seed=[1, 2], hires_strength=[0.4, 0.9]).images
    assert compiled == []
    for i, strength in enumerate((0.4, 0.9)):
        alone = ours(**call, seed=i + 1, hires_strength=strength).images[0]
        np.testing.assert_allclose(alone, both[i], atol=1e-5)


def test_commands_and_jobs(one_level_folder, upscaler, tmp_path):
    """`--from` makes it again from the small size that is recorded; a job makes the same picture."""
    options = ["--steps", "4", "--size", "16x16", "--hires-scale", "2", "--hires-upscaler", "model"]
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    model = ["--model", str(one_level_folder), "--upscaler", str(upscaler)]
    assert command("generate", "a goose", *model, *options, "--out", str(first)) == 0
    assert command("generate", "--from", str(first), "--out", str(again)) == 0
    with Image.open(first) as made:
        assert made.size == (32, 32)
        assert "Size: 16x16, Hires upscale: 2.0" in made.text["parameters"]
    np.testing.assert_array_equal(Image.open(again), Image.open(first))
    line = {"prompt": "a goose", "width": 16, "height": 16, "num_inference_steps": 4, "hires_scale": 2}
    job = [line | {"hires_upscaler": "model"}, line]
    batch.run(job, tmp_path / "out", model=str(one_level_folder), upscaler=str(upscaler))
    made = [np.asarray(Image.open(path), int) for path in sorted((tmp_path / "out").rglob("*.png"))]
    assert len(made) == 2
    assert min(np.abs(own - np.asarray(Image.open(first), int)).max() for own in made) <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hires_strength": 0.5}, "hires_strength: only with hires_scale"),
        ({"hires_upscaler": "lanczos"}, "hires_upscaler: only with hires_scale"),
        ({"hires_scale": 2, "hires_strength": 0}, "hires_strength, of the second pass: strength=0.0 must be"),
        ({"hires_scale": 0.5}, "hires_scale must be a finite number from 1 to 16"),
        ({"hires_scale": 2, "hires_strength": 0.01}, "leaves none of 6 steps"),
        ({"hires_scale": 2, "hires_upscaler": "esrgan"}, "hires_upscaler must be one of latent, lanczos, model"),
        ({"hires_scale": 2, "denoising_end": 0.5}, "hires_scale: not with denoising_start and denoising_end"),
        (
            {"hires_scale": 2, "image": picture(1, 16, 16), "mask_image": picture(2, 16, 16)},
            "hires_scale: not with a mask",
        ),
    ],
)
def test_bad_arguments(ours, arguments, message):
    with compilations() as compiled, pytest.raises(ValueError, match=message):
        ours("a goose", **CALL, **arguments)
    assert compiled == []


def test_without_an_upscaler(one_level_folder):
    pipe = sdjax.StableDiffusionPipeline.from_pretrained(one_level_folder)
    with pytest.raises(ValueError, match="this pipeline has no upscaler; load it with upscaler="):
        pipe("a goose", hires_scale=2, hires_upscaler="model", **CALL)


def test_large_pictures_are_upscaled_in_tiles(ours, monkeypatch):
    """Within the first tile and beside no other, a picture is what the tile alone becomes."""
    monkeypatch.setattr(programs, "UPSCALED_TILE", 16)
    wide = np.random.default_rng(0).random((ours.mesh.size, 16, 40, 3), np.float32)
    graph, params = ours.network("upscaler")
    made = programs.larger_pictures(ours.mesh, graph, params, 2 * wide - 1, (64, 160))
    tile = oracle.nhwc(test_rrdbnet.reference(test_rrdbnet.tensors(4), oracle.nchw(wide[:1, :, :16]), 4))
    np.testing.assert_allclose(made[:1, :, :32], (2 * tile - 1).clip(-1, 1)[:, :, :32], atol=1e-4)
