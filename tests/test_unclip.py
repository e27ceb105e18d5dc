"""Stable unCLIP against PyTorch diffusers: variations of a picture, whose noised embedding conditions the UNet."""

from dataclasses import replace

import diffusers
import numpy as np
import oracle
import pytest
from compilations import compilations
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from test_image_to_image import CALL, picture
from test_upscaler import SEEDS, each
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import sdjax
from sdjax import batch, sampling
from sdjax.checkpoints.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' schedulers
WIDTH = 18
UNCLIP = replace(
    oracle.SD2,
    unet={**oracle.SD2.unet, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * WIDTH},
)
ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": WIDTH,
}
LEVELS = (300, 0)
PROMPTS = ("a goose", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unclip")
    parts = oracle.pipeline(folder, UNCLIP).components
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    theirs = diffusers.StableUnCLIPImg2ImgPipeline(
        **{name: parts[name] for name in names},
        image_encoder=oracle.randomised(CLIPVisionModelWithProjection(CLIPVisionConfig(**ENCODER)), 5),
        image_normalizer=oracle.randomised(StableUnCLIPImageNormalizer(WIDTH), 6),
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    )
    theirs.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def ours(folder):
    return sdjax.StableDiffusionPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    return oracle.opened(folder, diffusers.StableUnCLIPImg2ImgPipeline)


@pytest.mark.parametrize(
    ("name", "options"), [("ddim", {}), ("euler_ancestral", {"guidance_scale": 1.0, "height": 24, "width": 8})]
)
def test_pictures_are_those_of_pytorch(ours, theirs, name, options):
    """With a picture of another size, a noise_level and a prompt, or none, for each of a batch."""
    scheduler = sampling.from_config(ours.scheduler.config, sampler=name)
    theirs.scheduler = getattr(diffusers, scheduler.config["_class_name"]).from_config(dict(scheduler.config))
    pictures = [picture(1, 31, 20), picture(2, 12, 17)]
    expected = each(theirs, pictures, LEVELS, PROMPTS, **CALL | options)
    call = {"prompt": PROMPTS, "image": pictures, "noise_level": LEVELS, "scheduler": scheduler} | CALL | options
    made = ours(seed=SEEDS, noise="torch", **call).images
    assert made.shape == (2, options.get("height", 16), options.get("width", 16), 3)
    oracle.assert_close(made, expected, 1e-4)


def test_levels_and_pictures_compile_nothing(ours):
    call = CALL | {"prompt": "", "seed": [1, 2]}
    ours(image=[picture(1, 12, 8), picture(2, 30, 20)], **call)
    with compilations() as compiled:
        both = ours(image=[picture(3, 16, 8), picture(4, 12, 8)], noise_level=[999, 0], **call).images
    assert compiled == []
    usual = ours(image=picture(4, 12, 8), **call | {"seed": 2}).images[0]
    np.testing.assert_allclose(usual, both[1], atol=1e-5)
    assert ours.guidance_scale == 10


def test_a_saved_pipeline_is_pytorchs(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    pictures = [picture(1, 12, 8), picture(2, 12, 8)]
    call = {"prompt": PROMPTS, "image": pictures, "noise_level": LEVELS} | CALL
    made = ours(seed=SEEDS, noise="torch", **call).images
    again = oracle.opened(tmp_path, diffusers.StableUnCLIPImg2ImgPipeline)
    oracle.assert_close(made, each(again, pictures, LEVELS, PROMPTS, **CALL), 1e-4)


def test_a_job(folder, tmp_path):
    for i, size in enumerate([(12, 9), (20, 8)]):
        picture(i, *size).save(tmp_path / f"{i}.png")
    line = {"prompt": "", "image": [str(tmp_path / f"{i}.png") for i in (0, 1)], "num_inference_steps": 3}
    result = batch.run([line], tmp_path / "out", model=str(folder), batch=2)
    assert result.made == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "this UNet varies pictures: give image"),
        ({"mask_image": picture(2, 12, 8)}, "and no mask"),
        ({"noise_level": 1000}, "noise_level must be a whole number from 0 to 999, not 1000"),
        ({"strength": 0.5}, "strength: only with image"),
        ({"denoising_start": 0.3}, "denoising_start: not with a UNet that edits, enlarges or varies"),
        ({"hires_scale": 2}, "hires_scale: not with"),
    ],
)
def test_bad_arguments(ours, arguments, message):
    given = {"image": picture(1, 12, 8)} if arguments else {}
    with compilations() as compiled, pytest.raises(ValueError, match=message):
        ours("a goose", **CALL | given | arguments)
    assert compiled == []


def test_parts_of_several_checkpoints(folder, sd1_folder):
    with pytest.raises(CheckpointError, match="projection_class_embeddings_input_dim, None, are not twice"):
        sdjax.StableDiffusionPipeline.from_pretrained(folder, unet=sd1_folder)
    ours = sdjax.StableDiffusionPipeline.from_pretrained(folder, image_normalizer=None)
    with pytest.raises(ValueError, match="the pipeline has no image_normalizer"):
        ours("", image=picture(1, 12, 8), **CALL)
