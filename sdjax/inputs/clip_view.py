"""What CLIP's image encoder sees of a picture."""

import numpy as np
from PIL import Image

from sdjax.models.clip_vision import MEAN, STD
from sdjax.pictures.picture import Picture, remembered

THINNEST = 16  # times as long as wide
READ = 32  # pictures that are remembered: a batch may be shown some many times


@remembered(READ)
def clip_view(picture: Picture, size: int) -> np.ndarray:
    """[size size 3] the middle of the picture, its shorter side resized to `size` (bicubic), colours normalised."""
    image = picture.rgb()
    short = min(image.size)
    if max(image.size) > THINNEST * short:  # of which nothing but the middle is seen
        x, y = ((side - min(side, THINNEST * short)) // 2 for side in image.size)
        image = image.crop((x, y, image.width - x, image.height - y))
    width, height = (int(size * side / short) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return (np.asarray(image, np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
