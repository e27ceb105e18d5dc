"""What is remembered of pictures, without the pictures."""

import gc
import weakref

import numpy as np
from PIL import Image

from sdjax.pictures import picture
from sdjax.pictures.picture import Picture, remembered


def of(grey: int) -> Picture:
    return picture.read("image", Image.new("RGB", (4, 4), (grey,) * 3))


def test_the_last_of_the_same_content_are_remembered():
    asked = []

    @remembered(2)
    def seen(picture: Picture, times: int) -> float:
        asked.append((picture.size, times))
        return times * float(np.mean(picture.rgb()))

    assert [seen(of(1), 1), seen(of(1), 1), seen(of(1), 2), seen(of(3), 1), seen(of(1), 2)] == [1, 1, 2, 3, 2]
    assert len(asked) == 3
    assert seen(of(1), 1) == 1
    assert len(asked) == 4


def test_the_picture_itself_is_not_kept():
    seen = remembered(2)(lambda picture: picture.size)
    given = of(7)
    image = weakref.ref(given.image)
    assert seen(given) == (4, 4)
    del given
    gc.collect()
    assert image() is None
