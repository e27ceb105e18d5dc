"""Pictures that come as data, and are sent as data."""

import base64
import binascii
import io
import re
from typing import Any

from PIL import Image

from sdjax.pictures import picture
from sdjax.pictures.picture import Picture

PREVIEW_SIDE = 512  # pixels, at most
PREVIEW = {"format": "WEBP", "quality": 75}
DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)
SHOWN = "must be a picture as base64 or as a data URL"


def decoded(name: str, value: Any) -> bytes:
    """The bytes of base64 or of a data URL. Raises ValueError that begins with the name."""
    if not isinstance(value, str):
        raise ValueError(f"{name} {SHOWN}")
    start = DATA_URL.match(value)
    try:
        data = base64.b64decode("".join(value[start.end() if start else 0 :].split()), validate=True)
    except (binascii.Error, ValueError):  # not ASCII
        data = b""
    if not data:
        raise ValueError(f"{name} {SHOWN}; paths and addresses are not taken")
    return data


def opened(name: str, data: bytes, most_pixels: int) -> Image.Image:
    """Of the bytes of a file, of which the header is read. Raises ValueError that begins with the name."""
    image = picture.opened(name, data)
    if image.width * image.height > most_pixels:
        raise ValueError(f"{name}: is of {image.width}x{image.height}, more than {most_pixels:,} pixels")
    return image


def of_image(name: str, image: Image.Image) -> Picture:
    """The picture, decoded. Raises ValueError that begins with the name for a damaged one."""
    try:
        return picture.read(name, image)
    except ValueError:
        raise
    except Exception:  # of many types, by codec
        raise ValueError(f"{name}: is damaged") from None


def data_url(image: Image.Image) -> str:
    """A small picture as a data URL."""
    small = image.copy()
    small.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    return f"data:image/webp;base64,{base64.b64encode(file(small, **PREVIEW)).decode()}"


def file(image: Image.Image, **options: Any) -> bytes:
    """A picture file, as Pillow writes it."""
    written = io.BytesIO()
    image.save(written, **options)
    return written.getvalue()
