"""What is read of a body before a server has it: pictures in lists, and how many pixels of them."""

import base64
import io

import pytest
from PIL import Image

from sdjax.serve import pictures
from sdjax.serve.catalog import Catalog
from sdjax.serve.fields import Reader
from sdjax.serve.held import Busy, Held, Share
from sdjax.serve.limits import Limits

SIDE = 16
PIXELS = SIDE * SIDE


def url(grey: int = 0) -> str:
    file = io.BytesIO()
    Image.new("L", (SIDE, SIDE), grey).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def reader(held: Held | None = None, most: int = 100 * PIXELS) -> Reader:
    held = held or Held(most)
    catalogs = (Catalog(kind, None) for kind in ("LoRA", "ControlNet", "upscaler"))
    return Reader(Limits(sent_pixels=most), *catalogs, Share(held, most))


@pytest.mark.parametrize("name", ["ip_adapter_image", "ip_adapter_mask"])
def test_pictures_come_alone_in_lists_and_in_lists_of_lists(name):
    def greys(value):
        asked = reader().asked({"prompt": "goose", name: value})
        return [[one.rgb().getpixel((0, 0))[0] for one in own] for own in getattr(asked.request, name)]

    assert greys(url(7)) == [[7]]
    assert greys([url(7), url(8)]) == [[7], [8]]
    assert greys([[url(7), url(8)], [url(9)]]) == [[7, 8], [9]]


@pytest.mark.parametrize("value", [[[url()] * 16] * 16, [url()] * 12])
def test_pixels_are_counted_before_they_are_decoded(value, monkeypatch):
    decoded, read = [], pictures.of_image
    monkeypatch.setattr(pictures, "of_image", lambda *given: decoded.append(0) or read(*given))
    with pytest.raises(ValueError, match=r"^ip_adapter_image: more than 2,560 pixels are sent with one request"):
        reader(most=10 * PIXELS).asked({"prompt": "goose", "ip_adapter_image": value})
    assert len(decoded) == 10


def test_requests_share_what_is_held_until_they_end():
    held = Held(3 * PIXELS)
    first, second = reader(held), reader(held)
    given = {"prompt": "goose", "control_image": [url(), url()]}
    first.asked(given)
    with pytest.raises(Busy):
        second.asked(given)
    second.share.close()
    for _ in range(2):
        first.share.close()
    second.asked(given)
    with pytest.raises(Busy):
        first.asked(given)
