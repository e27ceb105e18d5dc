"""The safety checker flags what PyTorch's flags, in every checkpoint that has one."""

import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import oracle
import pytest
import torch
import transformers
from diffusers.pipelines.stable_diffusion import safety_checker as diffusers_checker
from references import TOLERANCE, load, their_picture
from saved_formats import save_flax

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' schedulers

CHECKER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
}


@pytest.fixture(scope="module")
def checked(references, tmp_path_factory) -> tuple[Path, dict[str, Any], diffusers.StableDiffusionPipeline]:
    """A folder with a safety checker that flags half of the pictures of a call, the call, PyTorch's pipeline."""
    reference = references("sd1")
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.CLIPConfig(projection_dim=12, vision_config=CHECKER, text_config=text)
    checker = oracle.randomised(diffusers_checker.StableDiffusionSafetyChecker(config))
    seen = transformers.CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    call = reference.call | {"latents": oracle.normal(4, 8, 8, 4), "num_images_per_prompt": 4}
    pixels = torch.tensor(np.stack(seen(images_of(their_picture(reference.pipe, call))).pixel_values))
    embeds = checker.visual_projection(checker.vision_model(pixels).pooler_output)
    nearest = diffusers_checker.cosine_distance(embeds, checker.concept_embeds).max(1).values.sort().values
    checker.special_care_embeds_weights.fill_(2.0)  # never
    checker.concept_embeds_weights.fill_(float(nearest[1] + nearest[2]) / 2)
    pipe = diffusers.StableDiffusionPipeline(
        **{**reference.pipe.components, "safety_checker": checker, "feature_extractor": seen}
    )
    folder = tmp_path_factory.mktemp("checked")
    pipe.save_pretrained(folder)
    return folder, call, pipe


def images_of(pictures: np.ndarray) -> list[Any]:
    return diffusers.image_processor.VaeImageProcessor.numpy_to_pil(pictures)


def test_the_safety_checker(checked):
    folder, call, theirs = checked
    tensors = call | {"latents": oracle.nchw(call["latents"])}
    expected = theirs(**tensors)
    output = load(folder)(**call)
    assert output.nsfw_content_detected == expected.nsfw_content_detected
    assert sorted(output.nsfw_content_detected) == [False, False, True, True]
    oracle.assert_close(output.images, expected.images, TOLERANCE)
    assert [not picture.any() for picture in output.images] == output.nsfw_content_detected
    for off in (load(folder, safety_checker=None), load(folder)):
        off.safety_checker = None
        output = off(**call)
        assert output.nsfw_content_detected is None
        assert all(picture.any() for picture in output.images)


def test_a_safety_checker_for_a_checkpoint_without(checked, folders):
    folder, call, _ = checked
    pipe = load(folders("sd1"), safety_checker=folder)
    assert pipe(**call).nsfw_content_detected == load(folder)(**call).nsfw_content_detected


def test_a_safety_checker_is_saved(checked, tmp_path):
    folder, call, theirs = checked
    load(folder).save_pretrained(tmp_path)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    tensors = call | {"latents": oracle.nchw(call["latents"])}
    expected, output = theirs(**tensors), again(**tensors)
    assert output.nsfw_content_detected == expected.nsfw_content_detected
    oracle.assert_close(output.images, expected.images, TOLERANCE)


def test_a_safety_checker_that_is_listed_but_not_there(checked, tmp_path):
    folder = shutil.copytree(checked[0], tmp_path / "copied")
    shutil.rmtree(folder / "safety_checker")
    pipe = load(folder)
    assert pipe.safety_checker is None
    pipe.save_pretrained(tmp_path / "saved")
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert again.safety_checker is None
    assert again.config.requires_safety_checker is False


def test_the_safety_checker_of_flax(checked, tmp_path):
    folder, call, theirs = checked
    save_flax(theirs, tmp_path)
    assert load(tmp_path)(**call).nsfw_content_detected == load(folder)(**call).nsfw_content_detected
