"""Prompts that change from row to row: [from:to:when] and [one|other], and pictures of them."""

import diffusers
import numpy as np
import oracle
import pytest
import torch
from compilations import compilations

import sdjax
from sdjax import sampling
from sdjax.text.editing import by_row

CALL = {"num_inference_steps": 5, "output_type": "latent", "scheduler": "ddim", "height": 16, "width": 16}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # as the web UI's own documentation and tests of `get_learned_conditioning_prompt_schedules` have it, ten steps
        ("test", {9: "test"}),
        ("a [b:3]", {2: "a ", 9: "a b"}),
        ("a [b: 3]", {2: "a ", 9: "a b"}),
        ("a [[[b]]:2]", {1: "a ", 9: "a [[b]]"}),
        ("[(a:2):3]", {2: "", 9: "(a:2)"}),
        ("a [b : c : 1] d", {0: "a b  d", 9: "a  c  d"}),
        ("a[b:[c:d:2]:1]e", {0: "abe", 1: "ace", 9: "ade"}),
        ("a [unbalanced", {9: "a [unbalanced"}),
        ("a [b:.5] c", {4: "a  c", 9: "a b c"}),
        ("a [{b|d{:.5] c", {4: "a  c", 9: "a {b|d{ c"}),
        ("((a][:b:c [d:3]", {2: "((a][:b:c ", 9: "((a][:b:c d"}),
        ("[a|(b:1.1)]", dict(enumerate(["a", "(b:1.1)"] * 5))),
        ("[fe|]male", dict(enumerate(["female", "male"] * 5))),
        ("[fe|||]male", dict(enumerate((["female"] + ["male"] * 3) * 3))),
        ("[a:b:1.0]", {9: "a"}),
        ("[a::4]b", {3: "ab", 9: "b"}),
        (r"\[a|b\] [c|d]", dict(enumerate([r"\[a|b\] c", r"\[a|b\] d"] * 5))),
    ],
)
def test_the_text_of_each_row(text, expected):
    rows, last = [], 0
    for until, own in expected.items():
        rows += [own] * (until + 1 - last)
        last = until + 1
    assert by_row(text, 10, "web-ui") == rows[:10]
    assert by_row(text, 10, "plain") == [text] * 10


def test_words_and_long_texts():
    assert by_row("[cat:2] [a|b]", 2, "web-ui", r"\[cat:2\]") == ["[cat:2] a", "[cat:2] b"]
    assert by_row("[a|b] " * 20_000, 2, "web-ui") == ["a " * 20_000, "b " * 20_000]


@pytest.fixture(scope="module")
def ours(one_level_folder):
    return sdjax.StableDiffusionPipeline.from_pretrained(one_level_folder)


def test_pictures_are_made_with_the_text_of_each_row(ours, one_level_folder):
    """Written out with PyTorch's models; a batch in which one changes and one does not; a negative prompt that does."""
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(one_level_folder, safety_checker=None)
    scheduler = diffusers.DDIMScheduler.from_config(dict(sampling.from_config(ours.scheduler.config, "ddim").config))
    scheduler.set_timesteps(5)
    noise = oracle.normal(2, 4, 4, 4)
    texts = [["goose"] * 2 + ["blue"] * 3, ["go", "se", "go", "se", "go"]]
    negatives = [[""] * 5, ["blue"] + ["goose"] * 4]
    expected = []
    with torch.no_grad():
        for i in range(2):
            x = oracle.nchw(noise[i : i + 1])
            for row, t in enumerate(scheduler.timesteps):
                given = texts[i][row], negatives[i][row]
                c, u = (theirs.unet(x, t, theirs.encode_prompt(text, "cpu", 1, False)[0]).sample for text in given)
                x = scheduler.step(u + 6.0 * (c - u), t, x).prev_sample
            expected.append(oracle.nhwc(x)[0])
    prompts, negative = ["[goose:blue:0.4]", "[go|se]"], ["", "[blue:goose:1]"]
    call = CALL | {"guidance_scale": 6.0, "latents": noise}
    made = ours(prompts, negative_prompt=negative, **call).images
    oracle.assert_close(made, np.stack(expected), 1e-4)
    kept = ours(prompts, negative_prompt=negative, cache_interval=1, **call).images
    oracle.assert_close(kept, np.stack(expected), 1e-4)


def test_when_compiles_nothing_and_lengths_differ(ours):
    long = "goose " * 90  # more than a chunk
    ours(f"[{long}:blue:0.4]", **CALL)
    with compilations() as compiled:
        made = [ours(f"[{long}:blue:{when}]", **CALL).images for when in (0.2, 0.8)]
    assert compiled == []
    assert np.abs(made[0] - made[1]).max() > 0.01


def test_sdxl(tmp_path):
    """The pooled text changes as well; from a row on the picture is that of the other prompt."""
    pipe = sdjax.StableDiffusionPipeline.from_pretrained(oracle.save_pipeline(tmp_path, oracle.XL_ONE_LEVEL))
    call = CALL | {"height": 16, "width": 16}
    plain, whole = pipe("blue", **call).images, pipe("[goose:blue:0]", **call).images
    oracle.assert_close(whole, plain, 1e-4)
    assert np.abs(pipe("[goose:blue:2]", **call).images - plain).max() > 0.01
