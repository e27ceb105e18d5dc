"""Inpainting against PyTorch diffusers: UNets of 4 and of 9 channels, masks, what is kept."""

from dataclasses import replace

import diffusers
import numpy as np
import oracle
import pytest
from compilations import compilations
from PIL import Image
from test_image_to_image import CALL, SEEDS, generators, picture

import sdjax
from sdjax import sampling

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' schedulers
NINE = replace(oracle.SD1, unet={**oracle.SD1.unet, "in_channels": 9})
PIPELINES = {
    "sd1": (oracle.SD1, diffusers.StableDiffusionInpaintPipeline),
    "nine": (NINE, diffusers.StableDiffusionInpaintPipeline),
    "sdxl": (oracle.SDXL, diffusers.StableDiffusionXLInpaintPipeline),
}
CASES = [
    ("sd1", "ddim", {}, "half"),
    ("sd1", "dpmpp_2m", {"strength": 0.7}, "half"),
    ("sd1", "euler", {}, "grey"),
    ("sd1", "euler_ancestral", {"strength": 0.6}, "one pixel"),
    ("sd1", "heun", {"strength": 0.6}, "half"),
    ("sd1", "ddim", {}, "black"),
    ("nine", "ddim", {}, "half"),
    ("nine", "euler_ancestral", {"strength": 0.7}, "white"),
    ("sdxl", "euler", {}, "half"),
    ("sdxl", "dpmpp_2m_sde", {"strength": 0.7}, "grey"),
]


def mask(kind: str, width: int, height: int) -> Image.Image:
    values = np.zeros((height, width), np.uint8)
    if kind == "half":
        values[:, width // 3 :] = 255
    elif kind == "one pixel":
        values[8, 8] = 255
    elif kind == "grey":
        values[:] = np.linspace(0, 255, width, dtype=np.uint8)
    elif kind == "white":
        values[:] = 255
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Our pipeline and PyTorch's of a family."""
    made = {}

    def pair(name):
        if name not in made:
            family, pipeline = PIPELINES[name]
            folder = tmp_path_factory.mktemp(name)
            pytorch = oracle.pipeline(folder, family)
            pytorch.save_pretrained(folder / "model")
            theirs = (
                pipeline(**pytorch.components)
                if name == "sdxl"
                else pipeline(**pytorch.components, requires_safety_checker=False)
            )
            theirs.set_progress_bar_config(disable=True)
            made[name] = sdjax.StableDiffusionPipeline.from_pretrained(folder / "model"), theirs
        return made[name]

    return pair


@pytest.mark.parametrize(("family", "name", "options", "kind"), CASES)
def test_pictures_are_those_of_pytorch(pair, family, name, options, kind):
    """With the draws of the posteriors, the initial noise and the steps, two pictures in a batch."""
    ours, theirs = pair(family)
    scheduler = sampling.from_config(ours.scheduler.config, sampler=name)
    theirs.scheduler = getattr(diffusers, scheduler.config["_class_name"]).from_config(dict(scheduler.config))
    call = CALL | options | {"prompt": ["a goose", "blue"], "image": [picture(i, 32, 40) for i in (1, 2)]}
    call["mask_image"] = [mask(kind, 32, 40)] * 2
    expected = theirs(generator=generators(), height=40, width=32, **call).images
    made = ours(seed=SEEDS, noise="torch", scheduler=scheduler, keep_unmasked=False, **call).images
    np.testing.assert_allclose(made, expected, atol=1e-4)


def test_what_is_not_masked_keeps_its_pixels(pair):
    ours, _ = pair("sd1")
    own, half = picture(1, 32, 40), mask("half", 32, 40)
    call = CALL | {"prompt": "a goose", "image": own, "scheduler": "ddim", "seed": 1}
    made = ours(mask_image=half, **call).images[0]
    is_made = np.asarray(half)[..., None] > 127
    np.testing.assert_allclose(np.where(is_made, 0, made), np.where(is_made, 0, np.asarray(own) / 255), atol=1e-6)
    assert np.abs(made - np.asarray(own) / 255)[:, 12:].mean() > 0.02
    free = ours(mask_image=half, keep_unmasked=False, **call).images[0]
    np.testing.assert_array_equal(np.where(is_made, made, 0), np.where(is_made, free, 0))
    assert np.abs(free - made).max() > 0.01
    nothing = ours(mask_image=mask("black", 32, 40), **call).images[0]
    np.testing.assert_allclose(nothing, np.asarray(own) / 255, atol=1e-6)


def test_masks_and_strengths_compile_nothing_and_vary_in_a_batch(pair):
    ours, _ = pair("sd1")
    call = CALL | {"prompt": "a goose", "scheduler": "euler"}
    pictures, masks = [picture(i, 16, 16) for i in (1, 2)], [mask(kind, 16, 16) for kind in ("half", "grey")]
    ours(image=pictures, mask_image=masks[0], seed=[1, 2], **call)
    each = {"strength": [0.5, 1.0], "keep_unmasked": [True, False], "num_inference_steps": [6, 4]}
    call.pop("num_inference_steps")
    with compilations() as compiled:
        both = ours(image=pictures, mask_image=masks, seed=[1, 2], **call, **each).images
    assert compiled == []
    for i in range(2):
        own = {name: values[i] for name, values in each.items()}
        alone = ours(image=pictures[i], mask_image=masks[i], seed=i + 1, **call, **own).images[0]
        np.testing.assert_allclose(alone, both[i], atol=1e-5)


def test_kept_features_and_previews(pair):
    """DeepCache with a UNet that takes the mask: an interval of 1 is the whole network; previews are pasted as well."""
    ours, _ = pair("nine")
    own, half, seen = picture(1, 16, 16), mask("half", 16, 16), []
    call = CALL | {"prompt": "a goose", "image": own, "mask_image": half, "scheduler": "ddim"}
    whole = ours(**call, callback=lambda step, total, preview: seen.append(preview()[0])).images
    np.testing.assert_allclose(ours(**call, cache_interval=1).images, whole, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(seen[0])[:, :5], np.asarray(own)[:, :5])
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("sd1", {"mask_image": mask("half", 16, 16)}, "mask_image, of 16x16: .* and none is given"),
        ("sd1", {"image": picture(1, 16, 16), "mask_image": mask("half", 16, 8)}, "and it is of 16x16"),
        ("sd1", {"image": oracle.normal(1, 4, 4, 4), "mask_image": mask("half", 16, 16)}, "mask_image"),
        ("sd1", {"image": picture(1, 16, 16), "mask_image": [mask("half", 16, 16), None], "seed": [1, 2]}, "or none"),
        ("nine", {}, "this UNet is for inpainting: give image, and mask_image"),
        ("nine", {"image": picture(1, 16, 16)}, "this UNet is for inpainting"),
    ],
)
def test_bad_arguments(pair, family, arguments, message):
    ours, _ = pair(family)
    with compilations() as compiled, pytest.raises(ValueError, match=message):
        ours(**{"prompt": ["a goose"] * len(arguments.get("seed", [0])), **CALL, **arguments})
    assert compiled == []
