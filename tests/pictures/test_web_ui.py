"""sdjax.pictures.web_ui: the text of the web UI, read by sd-parsers, and texts that the web UI wrote."""

import pytest

from sdjax.pictures import web_ui
from sdjax.sampling import NAMES, from_config

SETTINGS = {
    "prompt": "a goose",
    "num_inference_steps": 20,
    "guidance_scale": 7.0,
    "seed": 1,
    "width": 512,
    "height": 768,
}
WRITTEN = """a goose, (red:1.2)
on two lines
Negative prompt: a duck,
blurry
Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 4012345678, Size: 512x768, \
Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, Clip skip: 2, RNG: CPU, \
Lora hashes: "style: 1234, more: 5678", Version: v1.10.1"""


@pytest.mark.parametrize("name", NAMES)
def test_every_sampler_is_read_back(name):
    config = dict(from_config(name).config)
    text = web_ui.parameters(SETTINGS | {"sampler": name, "scheduler": config})
    settings, _ = web_ui.read(text)
    assert settings["scheduler"] == name


def test_what_the_web_ui_wrote():
    settings, others = web_ui.read(WRITTEN)
    assert settings == {
        "prompt": "a goose, (red:1.2)\non two lines",
        "negative_prompt": "a duck,\nblurry",
        "num_inference_steps": 28,
        "guidance_scale": 6.5,
        "seed": 4012345678,
        "scheduler": "dpmpp_2m_karras",
        "width": 512,
        "height": 768,
        "clip_skip": 1,
        "noise": "torch",
    }
    assert others == {"Model": "v1-5-pruned-emaonly"}


@pytest.mark.parametrize(
    ("name", "schedule", "ours"),
    [
        ("DPM++ 2M Karras", "", "dpmpp_2m_karras"),  # before 1.9 the schedule was part of the name
        ("Euler a", "Automatic", "euler_ancestral"),
        ("euler A", "", "euler_ancestral"),
        ("PLMS", "", "pndm"),
    ],
)
def test_samplers_by_the_names_of_the_web_ui(name, schedule, ours):
    assert web_ui.sampler(name, schedule) == ours


def test_noise_is_that_of_a_gpu_unless_the_text_says_cpu():
    assert web_ui.read("a goose\nSteps: 1, Seed: 2, Size: 8x8")[0]["noise"] == "cuda"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a goose", "last line does not begin with 'Steps: '"),
        ("a goose\nSteps: 5, Sampler: DPM++ 3M SDE", "'DPM\\+\\+ 3M SDE' has no counterpart"),
        ("a goose\nSteps: 5, Sampler: Euler, Schedule type: Align Your Steps", "'Align Your Steps' has no counterpart"),
        ("a goose\nSteps: 5, CFG scale: seven", "CFG scale must be a finite number from -1e.06 to 1e.06, not 'seven'"),
        ("a goose\nSteps: 0, Sampler: Euler", "Steps must be a whole number, 1 or more, not 0"),
    ],
)
def test_what_cannot_be_made_again_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        web_ui.read(text)
