"""Dynamic Thresholding of guidance (CFG Scale Fix) against its formula, with PyTorch diffusers' models."""

import diffusers
import numpy as np
import oracle
import pytest
import torch
from compilations import compilations

import sdjax
from sdjax import sampling

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' schedulers
PROMPTS, NEGATIVE, SCALES = ["a goose", "blue"], "goose goose", [12.0, 8.0]
CALL = {"num_inference_steps": 5, "output_type": "latent"}
FOLDERS = {"epsilon": "one_level_folder", "v_prediction": "sd2_folder"}


def mimicked(x0_u, x0_c, scale, mimic, quantile):
    """Of one image, flattened to [C N]: the guided image in the range of a smaller guidance."""
    like, guided = (x0_u + g * (x0_c - x0_u) for g in (mimic, scale))
    mean = guided.mean(1, keepdim=True)
    most = (like - like.mean(1, keepdim=True)).abs().amax(1, keepdim=True)
    most_of_both = torch.maximum(most, torch.quantile((guided - mean).abs(), quantile, dim=1, keepdim=True))
    return mean + (guided - mean).clamp(-most_of_both, most_of_both) / most_of_both * most


@pytest.mark.parametrize(("prediction", "name"), [("epsilon", "euler"), ("v_prediction", "dpmpp_2m")])
def test_the_formula(request, prediction, name):
    """In a batch: with and without a percentile, and an image without."""
    folder = request.getfixturevalue(FOLDERS[prediction])
    ours = sdjax.StableDiffusionPipeline.from_pretrained(folder)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    noise, mimic, quantile, expected = oracle.normal(2, 8, 8, 4), [5.0, 3.0], [1.0, 0.6], []
    config = dict(sampling.from_config(ours.scheduler.config, name).config)
    for i in range(2):
        scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        scheduler.set_timesteps(CALL["num_inference_steps"])
        texts = torch.cat(theirs.encode_prompt(PROMPTS[i], "cpu", 1, True, NEGATIVE)[::-1])
        x = oracle.nchw(noise[i : i + 1]) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            a2 = scheduler.alphas_cumprod[t.long()]
            a, s, seen = a2.sqrt(), (1 - a2).sqrt(), scheduler.scale_model_input(x, t)
            with torch.no_grad():
                f = theirs.unet(seen.repeat(2, 1, 1, 1), t, texts).sample
            to_clean = (1 / a, -s / a) if prediction == "epsilon" else (a, -s)
            x0 = mimicked(*(to_clean[0] * seen + to_clean[1] * f).flatten(2), SCALES[i], mimic[i], quantile[i])
            f = (x0.reshape(seen.shape) - to_clean[0] * seen) / to_clean[1]
            x = scheduler.step(f, t, x).prev_sample
        expected.append(oracle.nhwc(x)[0])
    call = CALL | {"latents": noise, "scheduler": name, "guidance_scale": SCALES}
    made = ours(PROMPTS, NEGATIVE, mimic_scale=mimic, threshold_percentile=quantile, **call).images
    oracle.assert_close(made, np.stack(expected), 1e-4)
    off = ours(PROMPTS, NEGATIVE, **call).images[1]
    with compilations() as compiled:
        one = ours(PROMPTS, NEGATIVE, mimic_scale=[5.0, 0.0], **call).images
    assert compiled == []
    oracle.assert_close(one[0], expected[0], 1e-4)
    oracle.assert_close(one[1], off, 1e-4)
    assert np.abs(made[1] - off).max() > 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": 1.0, "mimic_scale": 7.0}, "mimic_scale: only with a guidance_scale above 1"),
        ({"threshold_percentile": 0.9}, "threshold_percentile: only with mimic_scale"),
    ],
)
def test_bad_arguments(one_level_folder, arguments, message):
    ours = sdjax.StableDiffusionPipeline.from_pretrained(one_level_folder)
    with pytest.raises(ValueError, match=message):
        ours("a goose", **CALL, **arguments)
