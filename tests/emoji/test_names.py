"""The package of drawings: their names, what is read of it, and its pictures."""

import io
import tarfile

import numpy as np
import pytest
from drawings import Drawings
from names import emoji_names, natural_name, read_names
from PIL import Image
from prepare import premultiplied, prepare
from test_drawings import disc


@pytest.mark.parametrize(
    ("name", "natural"),
    [
        ("man red hair", "man with red hair"),
        ("family man woman girl boy", "family of a man, a woman, a girl and a boy"),
        ("family woman boy", "family of a woman and a boy"),
        ("one o\u2019clock", "clock showing one o'clock"),
        ("six-thirty", "clock showing half past six"),
        ("goose", "goose"),
    ],
)
def test_natural_names(name, natural):
    assert natural_name(name) == natural


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
    drawings = prepare(tmp_path / "p.tgz", table, 4)
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


def test_no_name_has_a_skin_tone_or_is_of_a_country():
    names = emoji_names()
    assert names["1fabf"] == "goose"
    assert names["2764"] == "red heart"
    assert not any("skin tone" in name for name in names.values())
    assert not {"France", "United States"} & {*names.values()}
