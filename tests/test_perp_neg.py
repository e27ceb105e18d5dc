"""Perp-Neg against its formula, with PyTorch diffusers' models and schedulers."""

import diffusers
import numpy as np
import oracle
import pytest
import torch
from compilations import compilations

import sdjax
from sdjax import sampling

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' schedulers
PROMPTS, NEGATIVE, SCALES = ["a goose", "blue"], ["goose goose", "go"], [5.0, 3.0]
CALL = {"num_inference_steps": 5, "output_type": "latent"}
FAMILIES = {"sd1": (oracle.ONE_LEVEL, {"safety_checker": None}), "sdxl": (oracle.XL_ONE_LEVEL, {})}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    made = {}

    def pair(name):
        if name not in made:
            family, options = FAMILIES[name]
            folder = oracle.save_pipeline(tmp_path_factory.mktemp(name), family)
            theirs = family.pipeline.from_pretrained(folder, **options)
            theirs.set_progress_bar_config(disable=True)
            made[name] = sdjax.StableDiffusionPipeline.from_pretrained(folder), theirs
        return made[name]

    return pair


def predictor(theirs, image, size):
    """f(x, t) -> the predictions without a text, of the negative prompt and of the prompt."""
    prompt, negative, added = PROMPTS[image], NEGATIVE[image], {}
    if hasattr(theirs, "text_encoder_2"):
        c, empty, pooled_c, pooled_empty = theirs.encode_prompt(prompt, None, "cpu", 1, True)
        n, _, pooled_n, _ = theirs.encode_prompt(negative, None, "cpu", 1, True)
        ids = torch.tensor([[*size, 0, 0, *size]]).float()
        added = {"time_ids": ids.repeat(3, 1), "text_embeds": torch.cat([pooled_empty, pooled_n, pooled_c])}
    else:
        c, empty = theirs.encode_prompt(prompt, "cpu", 1, True)
        n, _ = theirs.encode_prompt(negative, "cpu", 1, True)
    texts = torch.cat([empty, n, c])

    def predictions(x, t):
        with torch.no_grad():
            return theirs.unet(x.repeat(3, 1, 1, 1), t, texts, added_cond_kwargs=added).sample.chunk(3)

    return predictions


@pytest.mark.parametrize(("family", "name"), [("sd1", "dpmpp_2m"), ("sdxl", "euler")])
def test_the_formula(pair, family, name):
    """u + g (c - u - w (n - u perpendicular to c - u)) of each image, one of which has another w, the other none."""
    ours, theirs = pair(family)
    side, weights, expected = ours.unet.config.sample_size, [1.5, 0.7], []
    noise, size = oracle.normal(2, side, side, 4), [side * ours.vae.config.factor] * 2
    config = dict(sampling.from_config(ours.scheduler.config, name).config)
    for i in range(2):
        scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        scheduler.set_timesteps(CALL["num_inference_steps"])
        predictions, x = predictor(theirs, i, size), oracle.nchw(noise[i : i + 1]) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            u, n, c = predictions(scheduler.scale_model_input(x, t), t)
            c, n = c - u, n - u
            perpendicular = n - (n * c).sum() / (c * c).sum() * c
            x = scheduler.step(u + SCALES[i] * (c - weights[i] * perpendicular), t, x).prev_sample
        expected.append(oracle.nhwc(x)[0])
    call = CALL | {"latents": noise, "scheduler": name, "guidance_scale": SCALES}
    made = ours(PROMPTS, NEGATIVE, perp_neg_scale=weights, **call).images
    oracle.assert_close(made, np.stack(expected), 1e-4)
    one_without = ours(PROMPTS, NEGATIVE, perp_neg_scale=[1.5, 0.0], **call).images
    oracle.assert_close(one_without[0], expected[0], 1e-4)
    oracle.assert_close(one_without[1], ours(PROMPTS, NEGATIVE, **call).images[1], 1e-4)
    assert np.abs(made[1] - one_without[1]).max() > 0.01


def test_it_is_data_and_goes_with_other_guidance(pair):
    ours, _ = pair("sd1")
    call = CALL | {"prompt": "a goose", "negative_prompt": "blue", "scheduler": "ddim", "height": 16, "width": 16}
    ours(**call, seed=[1, 2, 3], perp_neg_scale=1.0, pag_scale=1.0)
    each = {"perp_neg_scale": [2.0, 0.0, 0.5], "pag_scale": [0.0, 1.0, 2.0], "guidance_rescale": [0.3, 0.0, 0.0]}
    each |= {"cfg_plus_plus": [True, True, False], "guidance_scale": [0.6, 0.6, 4.0]}
    with compilations() as compiled:
        together = ours(**call, **each, seed=[1, 2, 3]).images
    assert compiled == []
    for i in range(3):
        own = {name: values[i] for name, values in each.items()}
        oracle.assert_close(ours(**call, **own, seed=[i + 1] * 3).images[0], together[i], 1e-4)
    interval = ours(**call, perp_neg_scale=1.0, guidance_interval=(0.0, 1e-9), seed=[1, 2, 3]).images
    oracle.assert_close(interval, ours(**call, guidance_scale=1.0, seed=[1, 2, 3]).images, 1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": 1.0}, "perp_neg_scale: only with a guidance_scale above 1"),
        ({"prompt": "a goose AND blue"}, "prompt: AND, which guidance adds up, does not go with a perp_neg_scale"),
        (
            {"prompt": ["a goose AND blue", "go"], "perp_neg_scale": [0.0, 1.0]},
            "perp_neg_scale: no picture of a batch has it beside one with AND",
        ),
        ({"perp_neg_scale": -1}, "perp_neg_scale must be a finite number from 0"),
        (
            {"negative_prompt_embeds": np.ones((1, 77, 24))},
            "perp_neg_scale: with a negative_prompt, not with",
        ),
    ],
)
def test_bad_arguments(pair, arguments, message):
    ours, _ = pair("sd1")
    with pytest.raises(ValueError, match=message):
        ours(**CALL | {"prompt": "a goose", "perp_neg_scale": 1.0} | arguments)


@pytest.mark.parametrize("argument", [{"perp_neg_scale": 1.0}, {"mimic_scale": 7.0}, {"prompt": "a goose AND blue"}])
def test_a_model_whose_own_scale_is_no_guidance(pair, argument, monkeypatch):
    ours, _ = pair("sd1")
    monkeypatch.setitem(ours.config, "guidance_scale", 1.0)
    with pytest.raises(ValueError, match="guidance_scale above 1"):
        ours(**CALL | {"prompt": "a goose"} | argument)
