"""sdjax.images: conversion, grids, and PNG files that carry their settings."""

import threading

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, PngImagePlugin

import sdjax.images
from sdjax.images import denormalize, image_grid, read_settings, save_png, to_pil, to_uint8

SETTINGS = {
    "prompt": "a goose on a blue background",
    "negative_prompt": "red, green",
    "sampler": "euler",
    "num_inference_steps": 25,
    "guidance_scale": 7.5,
    "seed": 2**64 - 1,
    "width": 48,
    "height": 32,
    "model": "some: folder",
}


def picture(color="blue", size=(48, 32)):
    return Image.new("RGB", size, color)


def test_conversion_is_that_of_diffusers():
    images = np.random.default_rng(0).normal(size=(2, 24, 16, 3)).astype(np.float32)
    images[0, 0, :, 0] = np.linspace(-1, 1, 16)
    processor, nchw = VaeImageProcessor(), torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    np.testing.assert_array_equal(denormalize(images), processor.postprocess(nchw, output_type="np"))
    expected = processor.postprocess(nchw, output_type="pil")
    for ours, theirs in zip(to_pil(images), expected, strict=True):
        assert (ours.mode, ours.size) == ("RGB", (16, 24))
        np.testing.assert_array_equal(ours, theirs)


def test_uint8_rounds_and_clips():
    levels = np.arange(256)
    np.testing.assert_array_equal(to_uint8(levels / 127.5 - 1), levels)
    np.testing.assert_array_equal(to_uint8((levels + 0.4) / 127.5 - 1), levels)
    np.testing.assert_array_equal(to_uint8(np.array([-np.inf, -1.1, 1.1, np.inf])), [0, 0, 255, 255])


def test_grid_runs_along_rows():
    colors = ["red", "lime", "blue", "white", "black", "yellow"]
    grid = image_grid([picture(color) for color in colors], rows=2, cols=3)
    assert grid.size == (3 * 48, 2 * 32)
    for index, color in enumerate(colors):
        row, col = divmod(index, 3)
        box = (col * 48, row * 32, (col + 1) * 48, (row + 1) * 32)
        np.testing.assert_array_equal(grid.crop(box), picture(color))


def test_grid_refuses_another_number_or_unequal_sizes():
    with pytest.raises(ValueError, match="2 rows and 2 columns needs 4 pictures, not 3"):
        image_grid([picture()] * 3, 2, 2)
    with pytest.raises(ValueError, match="one size"):
        image_grid([picture(), picture(size=(32, 48))], 1, 2)
    with pytest.raises(ValueError, match="needs 0 pictures"):
        image_grid([], 0, 3)


def test_png_carries_its_settings(tmp_path):
    path = save_png(tmp_path / "goose.png", picture(), SETTINGS)
    assert read_settings(path) == SETTINGS
    with Image.open(path) as image:
        np.testing.assert_array_equal(image, picture())
        assert image.text["parameters"] == (
            "a goose on a blue background\n"
            "Negative prompt: red, green\n"
            "Steps: 25, Sampler: euler, CFG scale: 7.5, Seed: 18446744073709551615, Size: 48x32, "
            'Model: "some: folder"'
        )


def test_prompts_beyond_latin_1_survive(tmp_path):
    prompt = "eine Gans 🦢 在蓝色背景上\nzweite Zeile"
    path = save_png(tmp_path / "鹅.png", picture(), SETTINGS | {"prompt": prompt, "negative_prompt": ""})
    assert read_settings(path)["prompt"] == prompt
    with Image.open(path) as image:
        assert image.text["parameters"].startswith(f"{prompt}\nSteps: 25")
        assert isinstance(image.text["parameters"], PngImagePlugin.iTXt)


def test_a_picture_without_settings_says_so(tmp_path):
    picture().save(tmp_path / "plain.png")
    with pytest.raises(ValueError, match=r"plain\.png: carries no sdjax settings"):
        read_settings(tmp_path / "plain.png")


def test_an_existing_file_is_never_overwritten(tmp_path):
    path = tmp_path / "goose.png"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"goose\.png: exists already"):
        save_png(path, picture(), SETTINGS)
    assert path.read_bytes() == b"precious"
    assert [file.name for file in tmp_path.iterdir()] == ["goose.png"]


def test_of_writers_at_once_one_wins(tmp_path):
    path, refused, start = tmp_path / "goose.png", [], threading.Barrier(8)

    def write(seed):
        start.wait()
        try:
            save_png(path, picture(), SETTINGS | {"seed": seed})
        except FileExistsError:
            refused.append(seed)

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {read_settings(path)["seed"], *refused} == set(range(8)) and len(refused) == 7
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, function):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sdjax.images.os, function, interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_png(tmp_path / "goose.png", picture(), SETTINGS)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cannot be written: .*goose\.png"):
        save_png(tmp_path / "nowhere" / "goose.png", picture(), SETTINGS)
