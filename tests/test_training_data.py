"""The data of the embedded model: names, captions, backgrounds, placement, tokenizer."""

import io
import tarfile

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from transformers import CLIPTokenizer as ReferenceTokenizer

from sdjax.training.drawings import PALETTE, Drawings, captions, compose, palette, place, with_article
from sdjax.training.prepare import emoji_names, premultiplied, prepare, read_wanted
from sdjax.training.vocabulary import train_tokenizer


@pytest.mark.parametrize(
    "phrase",
    ["a goose", "an owl", "a unicorn", "an orange heart", "a red apple", "a T-Rex", "grapes", "french fries", "an eye"],
)
def test_articles(phrase):
    name = phrase.removeprefix("a ").removeprefix("an ")
    assert with_article(name) == phrase


def test_captions_name_the_background_or_none():
    assert captions("owl", None) == ["an owl", "owl"]
    assert captions("grapes", None) == ["grapes", "grapes"]
    assert captions("goose", "blue") == ["a goose on a blue background", "goose on a blue background"]
    assert captions("goose", "orange")[0] == "a goose on an orange background"


def test_palette_colours_are_far_apart():
    colors = 255 * palette()
    assert colors.shape == (len(PALETTE), 3)
    distance = np.linalg.norm(colors[:, None] - colors, axis=-1)
    assert distance[~np.eye(len(colors), dtype=bool)].min() > 60


def disc(size=40, radius=12):
    """A red disc, opaque in the middle, with an antialiased edge: uint8 [size, size, 4], not premultiplied."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    alpha = np.clip(radius - np.hypot(x, y) + 0.5, 0, 1)
    rgba = np.zeros((size, size, 4), np.uint8)
    rgba[..., 0] = 255
    rgba[..., 3] = np.round(255 * alpha)
    return rgba


def test_invisible_colours_do_not_bleed_into_the_edge():
    rgba = disc()
    rgba[rgba[..., 3] == 0] = (0, 255, 0, 0)
    small = premultiplied(Image.fromarray(rgba), 20)
    assert small.shape == (20, 20, 4)
    assert small[..., 1].max() == 0
    assert (small[..., 0] <= small[..., 3]).all()


def test_a_picture_that_is_not_square_is_centred():
    tall = Image.fromarray(np.full((40, 20, 4), 255, np.uint8))
    alpha = premultiplied(tall, 40)[..., 3]
    assert alpha[:, 12:28].min() > 250
    assert alpha[:, :8].max() == alpha[:, 32:].max() == 0


def test_compose_is_pils_alpha_composite():
    color = (45, 105, 225)
    ground = Image.new("RGBA", (40, 40), (*color, 255))
    expected = np.asarray(Image.alpha_composite(ground, Image.fromarray(disc())))[..., :3]
    rgba = np.asarray(Image.fromarray(disc()).convert("RGBa"), np.float32) / 255
    np.testing.assert_allclose(compose(rgba, np.float32(color) / 255) * 255, expected, atol=1.5)


def centre_and_mass(alpha):
    y, x = np.mgrid[: alpha.shape[0], : alpha.shape[1]] + 0.5
    return np.array([(y * alpha).sum(), (x * alpha).sum()]) / alpha.sum(), alpha.sum()


def test_place_moves_and_resizes():
    rgba = jnp.asarray(np.asarray(Image.fromarray(disc()).convert("RGBa")) / 255, jnp.float32)
    _, mass = centre_and_mass(np.asarray(rgba[..., 3]))
    for zoom, shift in ((1.0, (0.0, 0.0)), (0.8, (3.0, -2.0)), (1.2, (-1.5, 0.5))):
        placed = place(rgba, 32, zoom, jnp.array(shift))
        assert placed.shape == (32, 32, 4)
        centre, placed_mass = centre_and_mass(np.asarray(placed[..., 3]))
        np.testing.assert_allclose(centre, 16 + np.array(shift), atol=0.1)
        np.testing.assert_allclose(placed_mass, mass * (zoom * 32 / 40) ** 2, rtol=0.02)


def package(path, codes):
    with tarfile.open(path, "w:gz") as tar:
        for i, code in enumerate(codes):
            file = io.BytesIO()
            Image.fromarray(np.full((8, 8, 4), 255 - i, np.uint8)).save(file, "WEBP", lossless=True)
            info = tarfile.TarInfo(f"package/assets/{code}.webp")
            info.size = file.tell()
            file.seek(0)
            tar.addfile(info, file)


def test_prepare_reads_the_package(tmp_path):
    package(tmp_path / "p.tgz", ["1fabf", "1f44b-1f3fb", "2764-fe0f", "1f984"])
    (tmp_path / "names.txt").write_text("unicorn\nred heart: heart\ngoose\n")
    drawings = prepare(tmp_path / "p.tgz", read_wanted(tmp_path / "names.txt"), 4)
    assert drawings.names == ["unicorn", "heart", "goose"]
    assert drawings.rgba[:, 0, 0, 3].tolist() == [252, 253, 255]
    drawings.save(tmp_path / "drawings.npz")
    again = Drawings.load(tmp_path / "drawings.npz")
    assert again.names == drawings.names
    np.testing.assert_array_equal(again.rgba, drawings.rgba)
    with pytest.raises(ValueError, match="owl"):
        prepare(tmp_path / "p.tgz", {"owl": "owl"}, 4)


def test_no_name_has_a_skin_tone():
    names = emoji_names()
    assert names["1fabf"] == "goose"
    assert names["2764"] == "red heart"
    assert not any("skin tone" in name for name in names.values())


TEXTS = ["a goose on a blue background", "", "An OWL", "T-Rex", "snow-capped", "Zürich 42!", "鹅", "it's 3pm"]


def test_the_tokenizer_is_clips(tmp_path):
    corpus = [text for name in ("goose", "T-Rex") for color in (None, *PALETTE) for text in captions(name, color)]
    tokenizer = train_tokenizer(corpus, vocab_size=640, model_max_length=24)
    assert len(tokenizer.vocab) <= 640
    assert {"goose</w>", "background</w>", "purple</w>"} <= tokenizer.vocab.keys()
    tokenizer.save_pretrained(tmp_path)
    reference = ReferenceTokenizer.from_pretrained(tmp_path)
    assert reference.model_max_length == 24
    expected = reference(TEXTS, padding="max_length", truncation=True, return_tensors="np")["input_ids"]
    np.testing.assert_array_equal(tokenizer(TEXTS), expected)
    assert tokenizer.vocab["<|endoftext|>"] == len(tokenizer.vocab) - 1  # what CLIPTextModel pools at
