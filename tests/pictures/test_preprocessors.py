"""What ControlNets are shown: shapes that stand in pictures of known shapes."""

import sys
import types
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sdjax.pictures import preprocessors
from sdjax.pictures.preprocessors import OWN, preprocessor


@pytest.fixture
def square() -> Image.Image:
    """A dark square on a light ground, framed by a black stroke."""
    image = Image.new("RGB", (64, 48), (230, 220, 200))
    ImageDraw.Draw(image).rectangle((20, 12, 44, 36), fill=(60, 90, 160), outline=(0, 0, 0), width=2)
    return image


def test_canny_finds_the_edges_and_nothing_else(square):
    edges = np.asarray(preprocessors.canny(square))
    assert {*np.unique(edges)} == {0, 255}
    y, x = np.nonzero(edges[..., 0])
    to_outline = np.minimum(np.abs(x - 20), np.abs(x - 44)), np.minimum(np.abs(y - 12), np.abs(y - 36))
    assert np.minimum(*to_outline).max() <= 3
    assert len(x) > 80
    assert not np.asarray(preprocessors.canny(Image.new("RGB", (16, 16), (9, 99, 200)))).any()


def test_lineart_finds_the_strokes(square):
    strokes = np.asarray(preprocessors.lineart(square), float)[..., 0]
    assert strokes[12:14, 24:40].mean() > 100
    assert strokes[:6].max() < 10
    assert strokes.max() == 255


def test_blurred_pictures_keep_their_colours(square):
    for name in ("blur", "tile"):
        made = np.asarray(OWN[name](square), float)
        np.testing.assert_allclose(made.mean(axis=(0, 1)), np.asarray(square, float).mean(axis=(0, 1)), atol=2)
        assert made.std() < np.asarray(square, float).std()


@pytest.mark.parametrize("name", OWN)
def test_any_size(name):
    for size in ((1, 1), (3, 70)):
        made = OWN[name](Image.new("RGB", size, (1, 2, 3)))
        assert (made.size, made.mode) == (size, "RGB")


def test_those_of_controlnet_aux(monkeypatch, square):
    """Its `Processor(name)(image)`, of another size, is brought to the picture's."""
    module = types.ModuleType("controlnet_aux.processor")
    module.MODELS = {"openpose": {}}
    module.Processor = lambda name: lambda image: Image.new("L", (512, 512), 77)
    package = types.ModuleType("controlnet_aux")
    package.processor = module
    package.__spec__ = ModuleSpec("controlnet_aux", None)
    monkeypatch.setitem(sys.modules, "controlnet_aux", package)
    monkeypatch.setitem(sys.modules, "controlnet_aux.processor", module)
    made = preprocessor("openpose")(square)
    assert (made.size, made.getpixel((3, 3))) == ((64, 48), (77, 77, 77))
    with pytest.raises(ValueError, match="'openpos' is unknown; controlnet_aux has openpose"):
        preprocessor("openpos")


def test_without_scikit_image(monkeypatch):
    monkeypatch.setattr(preprocessors, "find_spec", lambda name: None)
    preprocessor.cache_clear()
    with pytest.raises(ValueError, match=r"canny needs scikit-image: pip install 'sdjax\[control\]'"):
        preprocessor("canny")
