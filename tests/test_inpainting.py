"""Inpainting against PyTorch diffusers: UNets of 4 and of 9 channels, masks, what is kept."""

from dataclasses import replace

import diffusers
import numpy as np
import oracle
import pytest
import torch
from compilations import compilations
from PIL import Image, ImageFilter
from test_image_to_image import CALL, SEEDS, generators, picture

import sdjax
from sdjax import sampling
from sdjax.request import from_settings

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' schedulers
NINE = replace(oracle.ONE_LEVEL, unet={**oracle.ONE_LEVEL.unet, "in_channels": 9})
PIPELINES = {
    "sd1": (oracle.ONE_LEVEL, diffusers.StableDiffusionInpaintPipeline),
    "nine": (NINE, diffusers.StableDiffusionInpaintPipeline),
    "sdxl": (oracle.XL_ONE_LEVEL, diffusers.StableDiffusionXLInpaintPipeline),
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
    call = CALL | options | {"prompt": ["a goose", "blue"], "image": [picture(i, 32, 48) for i in (1, 2)]}
    call["mask_image"] = [mask(kind, 32, 48)] * 2
    expected = theirs(generator=generators(), height=48, width=32, **call).images
    made = ours(seed=SEEDS, noise="torch", scheduler=scheduler, keep_unmasked=False, **call).images
    np.testing.assert_allclose(made, expected, atol=1e-4)


def test_what_is_not_masked_keeps_its_pixels(pair):
    ours, _ = pair("sd1")
    own, half = picture(1, 32, 48), mask("half", 32, 48)
    call = CALL | {"prompt": "a goose", "image": own, "scheduler": "ddim", "seed": 1}
    made = ours(mask_image=half, **call).images[0]
    is_made = np.asarray(half)[..., None] > 127
    np.testing.assert_allclose(np.where(is_made, 0, made), np.where(is_made, 0, np.asarray(own) / 255), atol=1e-6)
    assert np.abs(made - np.asarray(own) / 255)[:, 12:].mean() > 0.02
    free = ours(mask_image=half, keep_unmasked=False, **call).images[0]
    np.testing.assert_array_equal(np.where(is_made, made, 0), np.where(is_made, free, 0))
    assert np.abs(free - made).max() > 0.01
    nothing = ours(mask_image=mask("black", 32, 48), **call).images[0]
    np.testing.assert_allclose(nothing, np.asarray(own) / 255, atol=1e-6)


def test_a_soft_mask_says_how_early_a_pixel_is_free(pair):
    """Differential diffusion (arXiv:2306.00950) written out with PyTorch's models and DDIM."""
    ours, theirs = pair("sd1")
    config = dict(sampling.from_config(ours.scheduler.config, sampler="ddim").config)
    scheduler, noise = diffusers.DDIMScheduler.from_config(config), oracle.normal(1, 12, 8, 4)
    own, soft = picture(1, 32, 48), mask("grey", 32, 48)
    generator = torch.Generator().manual_seed(7)
    posterior = theirs.vae.encode(oracle.nchw(np.float32(own)[None] / 127.5 - 1)).latent_dist
    clean = posterior.sample(generator) * theirs.vae.config.scaling_factor
    free = torch.from_numpy(np.float32(soft)[::4, ::4].copy() / 255)[None, None]
    scheduler.set_timesteps(10)
    steps, text = scheduler.timesteps[4:], theirs.encode_prompt("a goose", "cpu", 1, False)[0]
    noised = [scheduler.add_noise(clean, oracle.nchw(noise), t) for t in steps]
    x = noised[0]
    for i, t in enumerate(steps):
        x = torch.where(1 - free >= i / len(steps), noised[i], x)
        x = scheduler.step(theirs.unet(x, t, text).sample, t, x).prev_sample
    x = torch.where(free > 0, x, clean)
    call = {"num_inference_steps": 10, "strength": 0.6, "guidance_scale": 1.0, "scheduler": "ddim", "seed": 7}
    call |= {"mask_image": soft, "latents": noise, "image": own, "noise": "torch", "output_type": "latent"}
    oracle.assert_close(ours("a goose", soft_mask=True, **call).images, oracle.nhwc(x), 1e-4)
    assert np.abs(ours("a goose", **call).images - oracle.nhwc(x)).max() > 0.1


def test_a_blurred_mask_blends_the_pixels(pair):
    ours, _ = pair("sd1")
    own, half = picture(1, 32, 48), mask("half", 32, 48)
    call = CALL | {"prompt": "a goose", "image": own, "mask_image": half, "scheduler": "ddim"}
    hard, blurred = (ours(mask_blur=blur, **call).images[0] for blur in (0, 3))
    weight = np.float32(half.filter(ImageFilter.GaussianBlur(3)))[..., None] / 255
    free = ours(mask_blur=3, keep_unmasked=False, **call).images[0]
    assert np.abs(hard - blurred).max() > 0.05
    exact = (free > 0) & (free < 1)  # what is beyond is cut after the blending
    expected = weight * free + (1 - weight) * np.asarray(own) / 255
    np.testing.assert_allclose(blurred[exact], expected[exact], atol=1e-5)


@pytest.mark.parametrize("family", ["sd1", "nine"])
def test_a_region_is_worked_on_and_put_back(pair, family):
    """padding_mask_crop: a picture of the region at full size, in the picture; PyTorch's resizing rounds to 8 bits."""
    ours, theirs = pair(family)
    own = picture(3, 90, 60)
    spot = np.zeros((60, 90), np.uint8)
    spot[20:36, 50:70] = 255
    spot = Image.fromarray(spot)
    scheduler = sampling.from_config(ours.scheduler.config, sampler="ddim")
    theirs.scheduler = diffusers.DDIMScheduler.from_config(dict(scheduler.config))
    both = CALL | {"prompt": "a goose", "image": own, "mask_image": spot, "padding_mask_crop": 5, "output_type": "pil"}
    both |= {"height": 40, "width": 40, "strength": 0.7}
    expected = np.asarray(theirs(generator=generators()[0], **both).images[0], float)
    made = np.asarray(ours(seed=SEEDS[0], noise="torch", scheduler=scheduler, **both).images[0], float)
    assert made.shape == (60, 90, 3)
    assert np.abs(made - expected).mean() < 0.1
    assert (np.abs(made - expected) <= 4).mean() > 0.99
    outside = np.asarray(spot) == 0
    np.testing.assert_array_equal(made[outside], np.asarray(own)[outside])
    call = both | {"output_type": "np", "scheduler": scheduler}
    other = Image.fromarray(np.roll(np.asarray(spot), -20, axis=1))
    with compilations() as compiled:
        moved = ours(seed=SEEDS[0], noise="torch", **call | {"mask_image": other, "padding_mask_crop": 9}).images[0]
    assert compiled == []
    assert np.abs(moved - made / 255)[20:36, 30:50].max() > 0.05


def test_the_picture_around_a_region_stays(pair):
    """With a blurred mask, and without keep_unmasked: there is nothing but the picture outside of the region."""
    ours, _ = pair("sd1")
    own, spot = picture(3, 48, 40), np.zeros((40, 48), np.uint8)
    spot[16:24, 20:28] = 255
    call = CALL | {"prompt": "a goose", "scheduler": "ddim", "image": own, "height": 16, "width": 16}
    call |= {"mask_image": Image.fromarray(spot), "padding_mask_crop": 2}
    for options in ({"keep_unmasked": False}, {"mask_blur": 3}):
        made = ours(**call, **options).images[0]
        outside = np.ones((40, 48), bool)
        outside[4:36, 8:40] = False
        np.testing.assert_allclose(made[outside], np.float32(own)[outside] / 255, atol=1e-6)
        assert np.abs(made - np.float32(own) / 255)[16:24, 20:28].max() > 0.05


def test_outpainting(pair):
    """Is inpainting of the picture with its edges repeated, its margins white."""
    ours, _ = pair("sd1")
    own, margins = picture(1, 16, 16), np.full((24, 32), 255, np.uint8)
    margins[8:, 12:28] = 0
    call = CALL | {"prompt": "a goose", "scheduler": "ddim", "seed": 4}
    made = ours(image=own, outpaint=(12, 8, 4, 0), **call).images
    assert made.shape == (1, 24, 32, 3)
    np.testing.assert_allclose(made[0, 8:, 12:28], np.asarray(own) / 255, atol=1e-6)
    larger = Image.fromarray(np.pad(np.asarray(own), [(8, 0), (12, 4), (0, 0)], mode="edge"))
    same = ours(image=larger, mask_image=Image.fromarray(margins), **call).images
    np.testing.assert_array_equal(made, same)
    assert from_settings({"prompt": "x", "outpaint": "12,8,4,0"}).outpaint == (12, 8, 4, 0)
    for bad in ((0, 0, 0, 0), (1, 2), "1,2,3", -1, (-8, 0, 0, 8)):
        with pytest.raises(ValueError, match="outpaint must be LEFT,TOP,RIGHT,BOTTOM"):
            ours(image=own, outpaint=bad, **call)


@pytest.mark.parametrize("family", ["sd1", "nine"])
def test_masks_and_strengths_compile_nothing_and_vary_in_a_batch(pair, family):
    ours, _ = pair(family)
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
        ("sd1", {"outpaint": (8, 0, 0, 0)}, "outpaint: only with image"),
        ("sd1", {"soft_mask": True}, "soft_mask, mask_blur: only with mask_image, or outpaint"),
        ("sd1", {"padding_mask_crop": 4}, "padding_mask_crop: only with mask_image, or outpaint"),
        ("sd1", {"mask_blur": -1}, "mask_blur must be a whole number, from 0 to 4096"),
        (
            "nine",
            {"image": picture(1, 16, 16), "mask_image": mask("half", 16, 16), "soft_mask": True},
            "soft_mask: this",
        ),
        ("nine", {}, "this UNet is for inpainting: give image, and mask_image"),
        ("nine", {"image": picture(1, 16, 16)}, "this UNet is for inpainting"),
    ],
)
def test_bad_arguments(pair, family, arguments, message):
    ours, _ = pair(family)
    with compilations() as compiled, pytest.raises(ValueError, match=message):
        ours(**{"prompt": ["a goose"] * len(arguments.get("seed", [0])), **CALL, **arguments})
    assert compiled == []
