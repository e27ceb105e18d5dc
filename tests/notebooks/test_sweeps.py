"""Sheets of many settings, by a pipeline that is stood in for: it returns a colour for each picture."""

from types import SimpleNamespace

import pytest
from PIL import Image

from sdjax.notebooks import at_once, draw, sweep


class Pipe:
    def __init__(self, size=64, devices=1):
        self.unet = SimpleNamespace(config=SimpleNamespace(sample_size=size))
        self.vae = SimpleNamespace(config=SimpleNamespace(factor=8))
        self.mesh = SimpleNamespace(size=devices)
        self.calls = []

    def __call__(self, **arguments):
        self.calls.append(arguments)
        return SimpleNamespace(images=[Image.new("RGB", (8, 8), (seed, 0, 0)) for seed in arguments["seed"]])


@pytest.mark.parametrize(("size", "devices", "most"), [(16, 1, 4), (64, 1, 4), (96, 1, 1), (128, 1, 1), (128, 8, 8)])
def test_pictures_at_once_by_size_and_devices(size, devices, most):
    assert at_once(Pipe(size, devices)) == most


def test_pictures_are_drawn_in_calls_that_fit():
    pipe = Pipe()
    images = draw(pipe, seed=range(6), prompt=["a"] * 5 + ["b"], scheduler="euler")
    assert [image.getpixel((0, 0))[0] for image in images] == [*range(6)]
    first = {"seed": range(4), "prompt": ["a"] * 4, "scheduler": "euler"}
    assert pipe.calls == [first, {"seed": range(4, 6), "prompt": ["a", "b"], "scheduler": "euler"}]


def test_a_sweep_has_a_picture_for_each_row_and_column():
    pipe = Pipe()
    axes = {"seed": [10, 20, 30]}, {"prompt": ["a goose", ""]}
    sheet = sweep(pipe, *axes, num_inference_steps=5, seed=1)
    [first, second] = pipe.calls
    assert first["seed"] + second["seed"] == [10, 20, 30] * 2
    assert first["prompt"] + second["prompt"] == ["a goose"] * 3 + [""] * 3
    assert first["num_inference_steps"] == [5] * 4
    assert {(10, 0, 0), (20, 0, 0), (30, 0, 0)} <= {color for _, color in sheet.getcolors(1 << 20)}


def test_a_sweep_of_one_row():
    pipe = Pipe()
    sweep(pipe, {"prompt": ["a", "b"]}, seed=3)
    assert pipe.calls == [{"prompt": ["a", "b"], "seed": [3, 3]}]


def test_a_sweep_has_two_axes_at_most():
    with pytest.raises(ValueError, match="one argument each, not prompt, seed, guidance_scale"):
        sweep(Pipe(), {"seed": [1], "guidance_scale": [2]}, {"prompt": ["a"]})
