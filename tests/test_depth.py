"""SD 2 depth against PyTorch diffusers: image to image with a map of how near what is shown is."""

from dataclasses import replace

import diffusers
import numpy as np
import oracle
import pytest
import torch
from test_image_to_image import CALL, SEEDS, generators, picture

import sdjax
from sdjax import sampling
from sdjax.pictures import pixels

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' schedulers


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    family = replace(oracle.SD2, unet={**oracle.SD2.unet, "in_channels": 5})
    folder = tmp_path_factory.mktemp("depth")
    parts = oracle.pipeline(folder, family)
    parts.save_pretrained(folder / "model")
    index = (folder / "model" / "model_index.json").read_text()
    (folder / "model" / "model_index.json").write_text(
        index.replace('"StableDiffusionPipeline"', '"StableDiffusionDepth2ImgPipeline"')
    )
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    theirs = diffusers.StableDiffusionDepth2ImgPipeline(
        **{name: parts.components[name] for name in names}, depth_estimator=None, feature_extractor=None
    )
    theirs.set_progress_bar_config(disable=True)
    return sdjax.StableDiffusionPipeline.from_pretrained(folder / "model"), theirs


@pytest.mark.parametrize("name", ["ddim", "euler_ancestral"])
def test_pictures_are_those_of_pytorch(pair, name):
    ours, theirs = pair
    scheduler = sampling.from_config(ours.scheduler.config, sampler=name)
    theirs.scheduler = getattr(diffusers, scheduler.config["_class_name"]).from_config(dict(scheduler.config))
    maps = [picture(i, 24, 20).convert("L") for i in (3, 4)]
    both = CALL | {"prompt": ["a goose", "blue"], "image": [picture(1, 16, 24), picture(2, 16, 24)], "strength": 0.7}
    depth = torch.from_numpy(np.stack([np.float32(own) for own in maps]))
    expected = theirs(generator=generators(), depth_map=depth, **both).images
    made = ours(seed=SEEDS, noise="torch", scheduler=scheduler, depth_map=maps, **both).images
    np.testing.assert_allclose(made, expected, atol=1e-4)


@pytest.mark.parametrize("size", [(3, 5), (7, 9), (20, 31), (1, 1)])
def test_interpolation_is_pytorchs(size):
    values = oracle.normal(7, 9)
    expected = torch.nn.functional.interpolate(torch.from_numpy(values)[None, None], size, mode="bicubic")[0, 0]
    oracle.assert_close(pixels.interpolated(values, *size), expected.numpy())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": picture(1, 16, 16)}, "depth_map: this UNet takes one, brighter where the picture is nearer"),
        ({"depth_map": picture(1, 16, 16)}, "this UNet takes a depth_map beside image, and no mask"),
    ],
)
def test_bad_arguments(pair, arguments, message):
    with pytest.raises(ValueError, match=message):
        pair[0]("a goose", **CALL, **arguments)


def test_a_map_without_use(sd1_folder):
    ours = sdjax.StableDiffusionPipeline.from_pretrained(sd1_folder)
    with pytest.raises(ValueError, match="depth_map: only with a UNet that takes one"):
        ours("a goose", image=picture(1, 16, 16), depth_map=picture(2, 16, 16), **CALL)
