"""sdjax.pictures.images: conversion, grids, labelled sheets, and files that carry their settings."""

import io
import threading

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, PngImagePlugin
from sd_parsers import ParserManager

from sdjax.pictures.images import (
    FORMATS,
    contact_sheet,
    denormalize,
    encode,
    image_grid,
    read_settings,
    save_png,
    to_pil,
    to_uint8,
)

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


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cannot be written: .*goose\.png"):
        save_png(tmp_path / "nowhere" / "goose.png", picture(), SETTINGS)


@pytest.fixture(params=FORMATS)
def format(request):
    return request.param


KEPT = []  # the other tool takes a picture at the address of the last one for the same


@pytest.mark.parametrize("prompt", [SETTINGS["prompt"], "eine (Gans:1.2) 🦢, auf 蓝色\nzweite: Zeile"])
def test_another_tool_reads_how_a_picture_was_made(format, prompt):
    image = Image.open(io.BytesIO(encode(picture(), SETTINGS | {"prompt": prompt}, format)))
    KEPT.append(image)
    assert image.format == format.upper()
    found = ParserManager().parse(image)
    [sampler] = found.samplers
    assert (found.full_prompt, found.full_negative_prompt) == (prompt, "red, green")
    assert (sampler.name, found.metadata["Size"]) == ("euler", "48x32")
    assert sampler.parameters == {"seed": str(2**64 - 1), "steps": "25", "cfg_scale": "7.5"}


def test_every_format_carries_all_settings_and_the_picture(tmp_path, format):
    settings = SETTINGS | {"prompt": "🦢", "negative_prompt": None, "loras": {"a": 0.5}}
    path = tmp_path / f"goose{FORMATS[format].suffix}"
    path.write_bytes(encode(picture((40, 80, 120)), settings, format))
    assert read_settings(path) == settings
    with Image.open(path) as image:
        assert image.size == (48, 32)
        np.testing.assert_allclose(image.getpixel((20, 10)), (40, 80, 120), atol=0 if format == "png" else 3)


def test_equal_pictures_give_equal_bytes(format):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8))
    data = encode(noise, SETTINGS, format)
    assert data == encode(noise.copy(), dict(SETTINGS), format)
    assert data != encode(noise, SETTINGS | {"seed": 1}, format)


def test_a_file_has_the_bytes_of_encode(tmp_path):
    assert save_png(tmp_path / "a.png", picture(), SETTINGS).read_bytes() == encode(picture(), SETTINGS, "png")


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="one of png, webp, jpeg, not 'gif'"):
        encode(picture(), SETTINGS, "gif")


def boxes(sheet, colors):
    """Where each colour is: (left, top, right, bottom)."""
    pixels = np.asarray(sheet)
    found = []
    for color in colors:
        ys, xs = np.nonzero((pixels == color).all(-1))
        found.append((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
    return found


def is_blank(sheet, box):
    return (np.asarray(sheet.crop(box)) == 255).all()


COLORS = [(200, 0, 10 * i) for i in range(6)]


def test_a_sheet_has_its_pictures_in_rows_and_columns_beside_their_labels():
    pictures = [picture(color, (120, 100)) for color in COLORS]
    sheet = contact_sheet(pictures, ["steps 10", "steps 20"], ["euler", "ddim", "heun"], "guidance 7.5")
    places = boxes(sheet, COLORS)
    assert all((right - left, bottom - top) == (120, 100) for left, top, right, bottom in places)
    tops, lefts = [top for _, top, _, _ in places], [left for left, *_ in places]
    assert tops[0] == tops[1] == tops[2] < tops[3] - 100 and tops[3] == tops[4] == tops[5]
    assert lefts[:3] == lefts[3:] and lefts[0] < lefts[1] - 119 and lefts[1] < lefts[2] - 119
    for left, top, right, bottom in places[:3]:
        assert not is_blank(sheet, (left, top - 30, right, top))  # a column's label
        assert is_blank(sheet, (left, bottom, right, bottom + 8))
    for left, top, _, bottom in places[::3]:
        assert not is_blank(sheet, (0, top, left, bottom))  # a row's label
    assert not is_blank(sheet, (0, 0, 80, 28))  # the title


def test_a_long_label_takes_no_more_than_its_place():
    pictures = [picture(color, (120, 100)) for color in COLORS]
    prompt = "a goose with a " + "very " * 100 + "long neck"
    sheet = contact_sheet(pictures, [prompt, "word" * 100], [prompt, "word" * 100, "short"], prompt)
    (left, top, *_), *_ = places = boxes(sheet, COLORS)
    assert [(right - left, bottom - top) for left, top, right, bottom in places] == [(120, 100)] * 6
    assert left < 300 and top < 160 and sheet.width < 700
    assert is_blank(sheet, (left - 6, top, left, sheet.height))  # between a row's label and its picture
    assert is_blank(sheet, (0, places[0][3], sheet.width, places[3][1]))


def test_a_sheet_takes_pictures_of_any_size_and_gaps():
    sheet = contact_sheet(
        [picture(COLORS[0], (1024, 512)), None, picture(COLORS[1], (16, 16)), picture(COLORS[2], (64, 640))],
        ["", ""],
        ["", ""],
    )
    sizes = [(right - left, bottom - top) for left, top, right, bottom in boxes(sheet, COLORS[:3])]
    assert sizes == [(256, 128), (16, 16), (26, 256)]
    assert sheet.size == (8 + 2 * 264, 8 + 2 * 264)


def test_a_sheet_refuses_another_number():
    with pytest.raises(ValueError, match="2 rows and 2 columns needs 4 pictures, not 3"):
        contact_sheet([picture()] * 3, ["a", "b"], ["c", "d"])
