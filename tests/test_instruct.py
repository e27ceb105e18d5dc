"""InstructPix2Pix against PyTorch diffusers: three predictions a step, a picture beside the latents."""

from dataclasses import replace

import diffusers
import numpy as np
import oracle
import pytest
from compilations import compilations
from test_image_to_image import CALL, SEEDS, generators, picture

import sdjax
from sdjax import sampling

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' schedulers
FAMILIES = {
    "sd1": (oracle.ONE_LEVEL, diffusers.StableDiffusionInstructPix2PixPipeline),
    "sdxl": (oracle.XL_ONE_LEVEL, diffusers.StableDiffusionXLInstructPix2PixPipeline),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Our pipeline and PyTorch's of a family, which reads what we load."""
    made = {}

    def pair(name):
        if name not in made:
            family, kind = FAMILIES[name]
            folder = tmp_path_factory.mktemp(name)
            parts = oracle.pipeline(folder, replace(family, unet={**family.unet, "in_channels": 8})).components
            parts = {key: value for key, value in parts.items() if name == "sd1" or key not in OF_SD1}
            theirs = kind(**parts, **({"requires_safety_checker": False} if name == "sd1" else {}))
            theirs.set_progress_bar_config(disable=True)
            theirs.save_pretrained(folder / "model")
            made[name] = sdjax.StableDiffusionPipeline.from_pretrained(folder / "model"), theirs
        return made[name]

    return pair


OF_SD1 = ("image_encoder", "feature_extractor")
CASES = [
    ("sd1", "ddim", {}),
    ("sd1", "euler_ancestral", {"image_guidance_scale": 1.2}),
    ("sd1", "dpmpp_2m", {"guidance_scale": 1.0}),
    ("sd1", "heun", {"image_guidance_scale": 0.5}),
    ("sdxl", "euler", {"image_guidance_scale": 2.0}),
]


@pytest.mark.parametrize(("family", "name", "options"), CASES)
def test_pictures_are_those_of_pytorch(pair, family, name, options):
    ours, theirs = pair(family)
    scheduler = sampling.from_config(ours.scheduler.config, sampler=name)
    theirs.scheduler = getattr(diffusers, scheduler.config["_class_name"]).from_config(dict(scheduler.config))
    both = CALL | {"image": [picture(1, 32, 48), picture(2, 32, 48)], "prompt": ["a goose", "blue"]} | options
    size = {"height": 48, "width": 32} if family == "sdxl" else {}
    expected = theirs(generator=generators(), **both, **size).images
    made = ours(seed=SEEDS, noise="torch", scheduler=scheduler, **both).images
    np.testing.assert_allclose(made, expected, atol=1e-4)


def test_scales_compile_nothing_and_vary_in_a_batch(pair):
    ours, _ = pair("sd1")
    call = CALL | {"prompt": "a goose", "scheduler": "euler", "image": [picture(i, 16, 16) for i in (1, 2)]}
    ours(seed=[1, 2], **call)
    each = {"image_guidance_scale": [1.2, 2.0], "guidance_scale": [5.0, 1.0]}
    with compilations() as compiled:
        both = ours(seed=[1, 2], **call | each).images
    assert compiled == []
    for i in range(2):
        own = {name: values[i] for name, values in each.items()}
        alone = ours(seed=i + 1, **call | own | {"image": picture(i + 1, 16, 16)}).images[0]
        np.testing.assert_allclose(alone, both[i], atol=1e-5)
    kept = ours(seed=[1, 2], **call | each, cache_interval=1).images
    np.testing.assert_allclose(kept, both, atol=1e-5)


def test_a_saved_pipeline_is_pytorchs(pair, tmp_path):
    ours, theirs = pair("sd1")
    ours.save_pretrained(tmp_path)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    assert type(again) is type(theirs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "this UNet edits whole pictures: give image, the picture to edit"),
        ({"image": picture(1, 16, 16), "mask_image": picture(2, 16, 16)}, "and no mask"),
        (
            {"image": picture(1, 16, 16), "strength": 0.5},
            "strength: only with image, the picture to start from; an edit",
        ),
        ({"image": picture(1, 16, 16), "denoising_start": 0.3}, "denoising_start: not with a UNet that edits"),
        ({"image": oracle.normal(1, 4, 4, 4)}, "this UNet edits whole pictures"),
        ({"image": picture(1, 16, 16), "image_guidance_scale": "much"}, "image_guidance_scale must be a finite number"),
    ],
)
def test_bad_arguments(pair, arguments, message):
    ours, _ = pair("sd1")
    with compilations() as compiled, pytest.raises(ValueError, match=message):
        ours("a goose", **CALL, **arguments)
    assert compiled == []


def test_an_image_guidance_scale_without_use(one_level_folder):
    ours = sdjax.StableDiffusionPipeline.from_pretrained(one_level_folder)
    with pytest.raises(ValueError, match="image_guidance_scale: only with a UNet of InstructPix2Pix"):
        ours("a goose", image=picture(1, 16, 16), image_guidance_scale=1.5, **CALL)
