"""The x4 upscaler against PyTorch diffusers: a picture beside the latents, with noise, and how much as a class."""

import shutil
from dataclasses import replace

import diffusers
import numpy as np
import oracle
import pytest
import torch
from compilations import compilations
from PIL import Image
from test_image_to_image import CALL, command, picture

import sdjax
from sdjax import batch, sampling

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' schedulers
UPSCALER = replace(
    oracle.SD2,
    unet={**oracle.SD2.unet, "in_channels": 7, "num_class_embeds": 1000},
    vae={**oracle.SD2.vae, "block_out_channels": (8, 8, 16), "scaling_factor": 0.08333},
)
SEEDS, LEVELS = (7, 2**40), (35, 0)
PROMPTS = ("a goose", "blue")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upscaler")
    parts = oracle.pipeline(folder, UPSCALER).components
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    noising = diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="scaled_linear")
    theirs = diffusers.StableDiffusionUpscalePipeline(
        **{name: parts[name] for name in names}, low_res_scheduler=noising, max_noise_level=300
    )
    theirs.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def ours(folder):
    return sdjax.StableDiffusionPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    return oracle.opened(folder, diffusers.StableDiffusionUpscalePipeline)


def each(theirs, pictures, levels, prompts=PROMPTS, **call):
    """PyTorch's pictures, made one by one, since it takes one noise_level."""
    made = []
    for seed, level, prompt, image in zip(SEEDS, levels, prompts, pictures, strict=True):
        own = {"generator": torch.Generator().manual_seed(seed), "noise_level": level, "prompt": prompt}
        made.append(theirs(image=image, **own, **call).images[0])
    return np.stack(made)


@pytest.mark.parametrize(("name", "size"), [("ddim", (12, 8)), ("euler_ancestral", (15, 9))])
def test_pictures_are_those_of_pytorch(ours, theirs, name, size):
    """Also of an odd size, which is rounded down; with a noise_level for each picture of a batch."""
    scheduler = sampling.from_config(ours.scheduler.config, sampler=name)
    theirs.scheduler = getattr(diffusers, scheduler.config["_class_name"]).from_config(dict(scheduler.config))
    pictures = [picture(1, *size), picture(2, *size)]
    expected = each(theirs, pictures, LEVELS, **CALL)
    call = {"prompt": PROMPTS, "image": pictures, "noise_level": LEVELS, "scheduler": scheduler} | CALL
    made = ours(seed=SEEDS, noise="torch", **call).images
    assert made.shape == (2, 4 * 8, 4 * 12, 3)
    oracle.assert_close(made, expected, 1e-4)


def test_levels_and_pictures_compile_nothing(ours):
    call = CALL | {"prompt": "a goose", "seed": [1, 2]}
    ours(image=[picture(1, 12, 8), picture(2, 12, 8)], **call)
    with compilations() as compiled:
        both = ours(image=[picture(3, 12, 8), picture(4, 12, 8)], noise_level=[300, 20], **call).images
    assert compiled == []
    usual = ours(image=picture(4, 12, 8), **call | {"seed": 2}).images[0]
    np.testing.assert_allclose(usual, both[1], atol=1e-5)
    assert ours.guidance_scale == 9


def test_a_saved_pipeline_is_pytorchs(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    theirs = oracle.opened(tmp_path, diffusers.StableDiffusionUpscalePipeline)
    assert theirs.config.max_noise_level == 300
    pictures = [picture(1, 12, 8), picture(2, 12, 8)]
    call = {"prompt": PROMPTS, "image": pictures, "noise_level": LEVELS} | CALL
    made = ours(seed=SEEDS, noise="torch", **call).images
    oracle.assert_close(made, each(theirs, pictures, LEVELS, **CALL), 1e-4)


def test_the_command_and_a_job(folder, tmp_path):
    """`--from` makes the same picture; a job's are those of the call; what is wrong is named by line."""
    picture(1, 12, 9).save(tmp_path / "small.png")
    first, again, model = tmp_path / "first.png", tmp_path / "again.png", ["--model", str(folder)]
    options = ["--image", str(tmp_path / "small.png"), "--steps", "3", "--noise-level", "50", "--out", str(first)]
    assert command("generate", "a goose", *model, *options) == 0
    assert command("generate", "--from", str(first), *model, "--out", str(again)) == 0
    expected = values(first)
    assert expected.shape == (32, 48, 3)
    np.testing.assert_array_equal(values(again), expected)
    line = {"prompt": "a goose", "image": str(tmp_path / "small.png"), "num_inference_steps": 3}
    batch.run([line | {"noise_level": [50, 0]}], tmp_path / "out", model=str(folder), batch=2)
    differences = [abs(values(path) - expected).max() for path in (tmp_path / "out").rglob("*.png")]
    assert min(differences) <= 1 < max(differences)
    wrong = {
        "noise_level must be a whole number from 0 to 300, not 301": {"noise_level": 301},
        "width: 48, where a picture of 12x9": {"width": 44},
        "this UNet makes pictures larger: give image": {"image": None},
        "strength: only with image": {"strength": 0.5},
    }
    with pytest.raises(ValueError, match="line 1") as error:
        batch.run([line | own for own in wrong.values()], tmp_path / "other", model=str(folder))
    for number, reason in enumerate(wrong, 1):
        assert f"line {number}: {reason}" in str(error.value)


def values(path):
    with Image.open(path) as image:
        return np.asarray(image, np.int16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "this UNet makes pictures larger: give image"),
        ({"mask_image": picture(2, 12, 8)}, "and no mask"),
        ({"noise_level": 301}, "noise_level must be a whole number from 0 to 300, not 301"),
        ({"noise_level": -1}, "noise_level must be a whole number"),
        ({"noise_level": 10**30}, "noise_level must be a whole number from 0 to 300, not 1000"),
        ({"height": 40}, "height: 32, where a picture of 12x8 is made 4 times as large"),
        ({"strength": 0.5}, "strength: only with image"),
        ({"denoising_start": 0.3}, "denoising_start: not with a UNet that edits, enlarges"),
        ({"hires_scale": 2}, "hires_scale: not with"),
        ({"image": picture(1, 12, 3)}, "image: a picture of 12x3 is too small"),
        ({"image": oracle.normal(1, 4, 4, 4)}, "this UNet makes pictures larger: give image"),
    ],
)
def test_bad_arguments(ours, arguments, message):
    given = {"image": picture(1, 12, 8)} if arguments else {}
    with compilations() as compiled, pytest.raises(ValueError, match=message):
        ours("a goose", **CALL | given | arguments)
    assert compiled == []


def test_a_level_without_use(sd1_folder):
    ours = sdjax.StableDiffusionPipeline.from_pretrained(sd1_folder)
    with pytest.raises(ValueError, match="noise_level: only with a UNet that makes pictures larger"):
        ours("a goose", image=picture(1, 16, 16), noise_level=20, **CALL)


def test_other_upscalers_are_refused(folder, tmp_path):
    index = (folder / "model_index.json").read_text()
    (tmp_path / "model_index.json").write_text(index.replace("UpscalePipeline", "UpscaleGANPipeline"))
    with pytest.raises(ValueError, match="a StableDiffusionUpscaleGANPipeline is not supported; supported: "):
        sdjax.StableDiffusionPipeline.from_pretrained(tmp_path)


def test_a_list_in_place_of_the_highest_level(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(index.read_text().replace("300", "[300]"))
    with pytest.raises(ValueError, match=r"max_noise_level=\[300\]: must be a whole number from 0"):
        sdjax.StableDiffusionPipeline.from_pretrained(tmp_path / "model")


def test_the_only_scaling_factor(folder, tmp_path):
    """Whatever the VAE's config.json has, as in PyTorch."""
    shutil.copytree(folder, tmp_path / "model")
    config = tmp_path / "model" / "vae" / "config.json"
    config.write_text(config.read_text().replace("0.08333", "0.18215"))
    with pytest.warns(UserWarning, match="scaling_factor 0.08333 instead of 0.18215"):
        ours = sdjax.StableDiffusionPipeline.from_pretrained(tmp_path / "model", text_encoder=None)
    assert ours.vae.config.scaling_factor == 0.08333
