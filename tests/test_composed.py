"""Several prompts at once (a AND b:0.5), against the formula with PyTorch's models."""

import diffusers
import numpy as np
import oracle
import pytest
import torch
from compilations import compilations

import sdjax
from sdjax import sampling
from sdjax.text import prompts

CALL = {"num_inference_steps": 5, "output_type": "latent", "scheduler": "ddim", "height": 16, "width": 16}


@pytest.fixture(scope="module")
def ours(one_level_folder):
    return sdjax.StableDiffusionPipeline.from_pretrained(one_level_folder)


def test_the_predictions_are_added_up(ours, one_level_folder):
    """u + sum of g w (c - u) (arXiv:2206.01714, eq. 11), in a batch with prompts of other weights and numbers."""
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(one_level_folder, safety_checker=None)
    scheduler = diffusers.DDIMScheduler.from_config(dict(sampling.from_config(ours.scheduler.config, "ddim").config))
    scheduler.set_timesteps(5)
    noise, composed = oracle.normal(2, 4, 4, 4), [[("goose", 1.0), ("blue", 0.5), ("go", -0.2)], [("blue", 0.8)]]
    expected = []
    with torch.no_grad():
        for i, parts in enumerate(composed):
            x = oracle.nchw(noise[i : i + 1])
            texts = [theirs.encode_prompt(text, "cpu", 1, False)[0] for text, _ in [*parts, ("", 0)]]
            for t in scheduler.timesteps:
                *own, u = (theirs.unet(x, t, text).sample for text in texts)
                f = u + sum(6.0 * weight * (c - u) for c, (_, weight) in zip(own, parts, strict=True))
                x = scheduler.step(f, t, x).prev_sample
            expected.append(oracle.nhwc(x)[0])
    call = CALL | {"latents": noise, "guidance_scale": 6.0}
    made = ours(["goose AND blue:0.5 AND go :-.2", "blue:0.8 AND :0"], **call).images
    oracle.assert_close(made, np.stack(expected), 1e-4)


def test_weights_compile_nothing(ours):
    ours("goose AND blue:0.5", **CALL)
    with compilations() as compiled:
        made = [ours(f"goose AND blue:{weight}", **CALL).images for weight in (0.0, 0.7)]
    assert compiled == []
    oracle.assert_close(made[0], ours("goose", **CALL).images, 1e-4)
    assert np.abs(made[1] - made[0]).max() > 0.01


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a goose", [("a goose", 1.0)]),
        ("a goose 16:9", [("a goose 16:9", 1.0)]),
        ("a AND b", [("a ", 1.0), (" b", 1.0)]),
        ("(a:1.2) AND b : 2", [("(a:1.2) ", 1.0), (" b ", 2.0)]),
        ("LAND ANDY a,AND", [("LAND ANDY a,AND", 1.0)]),
        ("a\nAND\nb:-.5\n", [("a\n", 1.0), ("\nb", -0.5)]),
    ],
)
def test_parts(text, expected):
    assert prompts.parts(text, "web-ui") == expected
    assert prompts.parts(text, "plain") == [(text, 1.0)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"prompt": "a AND b", "guidance_interval": (0.1, 1.0)},
            "AND, which guidance adds up, does not go with a guidance_interval",
        ),
        ({"prompt": "a AND b", "guidance_scale": 1.0}, "AND needs a guidance_scale above 1"),
        ({"prompt": "a", "negative_prompt": "b AND c"}, "AND is not supported but between prompts"),
        ({"prompt": "a AND b:99999999"}, "its weight 1e.08 is more than 1e.06"),
    ],
)
def test_bad_prompts(ours, arguments, message):
    with compilations() as compiled, pytest.raises(ValueError, match=message):
        ours(**CALL | arguments)
    assert compiled == []
