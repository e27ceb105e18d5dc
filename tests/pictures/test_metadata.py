"""sdjax.pictures.metadata: files that carry their settings."""

import io
import threading

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from sd_parsers import ParserManager

from sdjax.pictures.metadata import FORMATS, encode, read_settings, save_png

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


def test_infinities_are_left_out_of_a_schedulers_config_alone(tmp_path):
    """Where older versions have them; elsewhere a default would stand for what was said."""
    text = PngImagePlugin.PngInfo()
    text.add_text("sdjax", '{"prompt": "a", "mimic_scale": Infinity, "scheduler": {"sigma_max": Infinity, "eta": 0.5}}')
    picture().save(tmp_path / "a.png", pnginfo=text)
    expected = {"prompt": "a", "mimic_scale": float("inf"), "scheduler": {"eta": 0.5}}
    assert read_settings(tmp_path / "a.png") == expected


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
