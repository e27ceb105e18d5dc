"""The data of the embedded model: names, captions, backgrounds, placement, tokenizer."""

import io
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from transformers import CLIPTokenizer as ReferenceTokenizer

from sdjax.training.captions import captions, is_held_out, own_color, pair_captions, with_article
from sdjax.training.drawings import PALETTE, Drawings, Placement, color_shares, compose, palette, place, turn
from sdjax.training.names import natural_name, read_names
from sdjax.training.prepare import emoji_names, premultiplied, prepare
from sdjax.training.scenes import GROUNDS, one_round, random_pictures
from sdjax.training.vocabulary import train_tokenizer

PHRASES = """
a goose, an owl, a unicorn, an orange heart, a red apple, a T-Rex, grapes, french fries, an eye, an hourglass done,
an NG button, a VS button, an x-ray, people with bunny ears, a man with a beard, two hearts, a bus, a compass, a dress,
the flag of France, Santa Claus, an octopus, a kiss between a man and a woman, clapping hands, an SUV
"""


@pytest.mark.parametrize("phrase", PHRASES.replace("\n", " ").strip().split(", "))
def test_articles(phrase):
    name = phrase.removeprefix("a ").removeprefix("an ").removeprefix("the ")
    assert with_article(name) == phrase


def test_captions_name_the_background_or_none():
    assert captions("owl", None)[:2] == ["an owl", "owl"]
    assert captions("grapes", None)[:2] == ["grapes", "grapes"]
    assert captions("goose", "blue")[:2] == ["a goose on a blue background", "goose on a blue background"]
    assert captions("goose", "orange")[0] == "a goose on an orange background"
    assert {len(captions("goose", color, own)) for color in (None, "blue") for own in (None, "gray")} == {6}


def test_captions_can_name_the_drawings_own_colour():
    assert captions("key", "purple", "yellow")[2:4] == [f"{a}yellow key on a purple background" for a in ("a ", "")]
    assert captions("grapes", None, "purple")[2:4] == ["purple grapes"] * 2
    shares = [float(color == "yellow") for color in PALETTE]
    assert own_color("key", shares) == "yellow"
    assert own_color("yellow heart", shares) is None
    assert own_color("flag of Spain", shares) is None
    assert own_color("key", [1 / len(PALETTE)] * len(PALETTE)) is None


def test_two_drawings_are_asked_for_from_left_to_right():
    texts = pair_captions(("goose", "eyes"), "blue")
    assert len(texts) == len(captions("goose", "blue"))
    assert texts[:2] == [f"{a}goose and eyes on a blue background" for a in ("a ", "")]


def test_one_pairing_in_ten_is_held_out_but_none_on_white():
    held_out = np.array([[is_held_out(f"name {i}", color) for color in PALETTE] for i in range(500)])
    assert not held_out[:, list(PALETTE).index("white")].any()
    assert held_out.mean() == pytest.approx(0.1 * 11 / 12, abs=0.01)


def test_rounds_show_every_pairing_but_those_held_out():
    names = [f"name {i}" for i in range(20)]
    shown = set()
    for number in range(len(GROUNDS)):
        for scenes in one_round(names, number, batch=8, pairs=2):
            alone = len(scenes.drawings) - len(scenes.beside)
            shown |= {(n, k) for n, k in zip(scenes.drawings[:alone], scenes.grounds[:alone], strict=True)}
            texts = scenes.captions(names, [None] * len(names))
            assert texts[0] == captions(names[scenes.drawings[0]], GROUNDS[scenes.grounds[0]])
            assert names[scenes.beside[-1]] in texts[-1][0]
            for name in (names[scenes.drawings[-1]], names[scenes.beside[-1]]):
                color = GROUNDS[scenes.grounds[-1]]
                assert color is None or not is_held_out(name, color)
    expected = {
        (n, k) for n, name in enumerate(names) for k, c in enumerate(GROUNDS) if not c or not is_held_out(name, c)
    }
    assert shown == expected


def test_pictures_stand_on_their_backgrounds_and_differ_by_the_key():
    rgba = np.zeros((4, 40, 40, 4), np.uint8)
    rgba[:, 10:30, 10:30] = (200, 0, 0, 255)
    colors = palette()[:4]
    first, second = (np.asarray(random_pictures(jax.random.key(i), rgba, rgba[:1], colors, 32)) for i in (0, 1))
    assert first.shape == (4, 32, 32, 3)
    np.testing.assert_allclose(first[:, 0, 0], 2 * colors - 1, atol=1e-6)
    assert np.abs(first - second).max(axis=(1, 2, 3)).min() > 0.1
    upright = [np.asarray(random_pictures(jax.random.key(i), rgba, rgba[:1], colors, 32, chance=0)) for i in (0, 1)]
    np.testing.assert_array_equal(*upright)
    np.testing.assert_allclose(upright[0], upright[0][:, ::-1], atol=1e-5)  # neither moved nor tilted
    red = np.abs(first[-1] - first[-1, 0, 0]).sum(-1) > 0.1  # the pair: something left, nothing in the middle, right
    assert red[:, :12].any() and not red[:, 15:17].any() and red[:, 20:].any()


@pytest.mark.parametrize(
    ("name", "code", "natural"),
    [
        ("France", "1f1eb-1f1f7", "flag of France"),
        ("United States", "1f1fa-1f1f8", "flag of the United States"),
        ("man red hair", "1f468-200d-1f9b0", "man with red hair"),
        ("family man woman girl boy", "1f468", "family of a man, a woman, a girl and a boy"),
        ("family woman boy", "1f469", "family of a woman and a boy"),
        ("one o\u2019clock", "1f550", "clock showing one o'clock"),
        ("six-thirty", "1f561", "clock showing half past six"),
        ("goose", "1fabf", "goose"),
    ],
)
def test_natural_names(name, code, natural):
    assert natural_name(name, code) == natural


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
        placed = place(rgba, 32, Placement(zoom, jnp.array(shift) / 32))
        assert placed.shape == (32, 32, 4)
        centre, placed_mass = centre_and_mass(np.asarray(placed[..., 3]))
        np.testing.assert_allclose(centre, 16 + np.array(shift), atol=0.1)
        np.testing.assert_allclose(placed_mass, mass * (zoom * 32 / 40) ** 2, rtol=0.02)


def test_a_turn_is_pils():
    picture = Image.fromarray(disc()).convert("RGBa")
    rgba = np.asarray(picture) / np.float32(255) * np.linspace(0, 1, 40, dtype=np.float32)[:, None, None]
    turned = np.asarray(turn(jnp.asarray(rgba), np.pi / 2))
    np.testing.assert_allclose(turned, np.rot90(rgba), atol=1e-5)


def test_light_keeps_colours_below_alpha():
    rgba = jnp.full((8, 8, 4), 0.5).at[..., 0].set(0.3)
    placed = place(rgba, 8, Placement(light=2.0))[4, 4]
    np.testing.assert_allclose(placed, [0.5, 0.5, 0.5, 0.5], atol=1e-5)
    np.testing.assert_allclose(place(rgba, 8, Placement(light=0.5))[4, 4], [0.15, 0.25, 0.25, 0.5], atol=1e-5)


def test_color_shares():
    rgba = np.zeros((10, 10, 4), np.uint8)
    rgba[:4, :, :] = (*PALETTE["yellow"], 255)
    rgba[4:5, :, :] = (*PALETTE["blue"], 255)
    shares = dict(zip(PALETTE, color_shares(rgba), strict=True))
    assert shares["yellow"] == pytest.approx(0.8) and shares["blue"] == pytest.approx(0.2)


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
    package(tmp_path / "p.tgz", ["1fabf", "1f44b-1f3fb", "2764-fe0f", "1f984", "1f1eb-1f1f7"])
    (tmp_path / "names.txt").write_text("red heart: heart\n")
    table = read_names(tmp_path / "names.txt")
    assert prepare(tmp_path / "p.tgz", table, 4).names == ["goose", "heart", "unicorn", "flag of France"]
    drawings = prepare(tmp_path / "p.tgz", table, 4, flags=False)
    assert drawings.names == ["goose", "heart", "unicorn"]
    assert drawings.rgba[:, 0, 0, 3].tolist() == [255, 253, 252]
    drawings.save(tmp_path / "drawings.npz")
    again = Drawings.load(tmp_path / "drawings.npz")
    assert again.names == drawings.names
    np.testing.assert_array_equal(again.rgba, drawings.rgba)
    with pytest.raises(ValueError, match=r"no drawing named.*owl"):
        prepare(tmp_path / "p.tgz", {"owl": "wise bird"}, 4)
    with pytest.raises(ValueError, match=r"several drawings.*goose"):
        prepare(tmp_path / "p.tgz", {"unicorn": "goose"}, 4)


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
