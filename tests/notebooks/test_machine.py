"""What a notebook says of its machine, and of its pipeline."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdjax
from sdjax.notebooks.machine import duration, flops
from sdjax.request import Request
from sdjax.runtime.parallel import data_mesh


@pytest.fixture(scope="module")
def pipe():
    return sdjax.StableDiffusionPipeline.from_pretrained(mesh=data_mesh(jax.devices()[:1]))


def test_without_an_accelerator_it_says_how_long_a_picture_takes(pipe):
    line = sdjax.notebooks.runs_on(pipe, num_inference_steps=7)
    assert re.fullmatch(
        r"There is no TPU and no GPU: this runs on 1 cpu\. A picture of 128x128 in 7 steps takes about [\d.]+ s, "
        r"the first one longer \(compiling\)\.",
        line,
    )


def test_with_one_it_names_it(pipe, monkeypatch):
    class Chip:
        platform, device_kind = "tpu", "TPU v5 lite"

    monkeypatch.setattr(pipe, "mesh", SimpleNamespace(devices=np.array([Chip()] * 8)))
    assert sdjax.notebooks.runs_on(pipe) == "Runs on 8 TPU v5 lite."


def test_a_step_more_is_two_more_calls_of_the_unet(pipe):
    few, many = (flops(pipe, Request("", scheduler="euler", num_inference_steps=steps)) for steps in (2, 12))
    x, text = jnp.zeros((2, 16, 16, 8)), jnp.zeros((2, 32, 192))
    called = jax.jit(pipe.unet).lower(x, jnp.zeros(2), text).cost_analysis()["flops"]
    assert (many - few) / 10 == pytest.approx(called, rel=0.05)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.123, "0.12 s"), (1.26, "1.3 s"), (42.4, "42 s"), (99.4, "99 s"), (150, "2.5 min"), (9000, "2.5 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_pipeline_is_a_table(pipe):
    page = pipe._repr_html_()
    for line in repr(pipe).splitlines()[1:-1]:
        for text in re.split(", |: ", line.strip()):
            assert f">{text}</t" in page
