"""Pictures that requests start from: read upright and in RGB, compared by their content. No JAX."""

import functools
import hashlib
import io
import os
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from sdjax.fields import brief

MAX_PIXELS = 2**26
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "TGA")
"""What is read: pixels, by Pillow itself, not by Ghostscript. MPO is JPEG with further pictures, which are left out"""
MAX_BYTES = 2**29  # so many pixels of 16 bits, with transparency, without compression
LONGEST_PATH = 255  # characters of one that is not there, in messages
WHITE = (255, 255, 255, 255)

Source = str | os.PathLike | Image.Image | np.ndarray
"""A file, a PIL picture, or an array [H W], [H W 1], [H W 3] or [H W 4], uint8 or float in 0..1"""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture, equal to others of the same content. Made by `read`; a file is decoded again when its pixels are used,
    so that a million of these take no memory."""

    sha256: str
    """of the file, or of the pixels of one that is in memory"""
    size: tuple[int, int]
    """(width, height), upright"""
    path: str | None = field(default=None, compare=False)
    image: Image.Image | None = field(default=None, compare=False, repr=False)
    """in place of a path"""

    def __str__(self) -> str:
        return "a picture in memory" if self.path is None else Path(self.path).name

    def rgb(self) -> Image.Image:
        """The picture in RGB. Raises ValueError for a file that has changed since it was read."""
        if self.image is not None:
            return self.image
        data = _bytes(self.path)
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise ValueError(f"{self.path}: has changed since it was read")
        return _decoded(self.path, data)

    def json(self) -> str:
        """PATH#sha256=HASH, which `read` takes back; of a picture in memory without a path."""
        return f"{self.path or ''}#sha256={self.sha256}"


def remembered(most: int) -> Callable[[Callable], Callable]:
    """Has a function of a picture, its first argument, remember what it gave last, so many times: by the content of the
    picture, which itself is not kept."""

    def decorated(function: Callable) -> Callable:
        found: OrderedDict[tuple, Any] = OrderedDict()
        lock = threading.Lock()

        @functools.wraps(function)
        def remembering(picture: Picture, *rest: Any) -> Any:
            key = picture.sha256, picture.size, *rest
            with lock:
                if key in found:
                    found.move_to_end(key)
                    return found[key]
            result = function(picture, *rest)
            with lock:
                found[key] = result
                if len(found) > most:
                    found.popitem(last=False)
            return result

        return remembering

    return decorated


def read(name: str, value: Any) -> Picture:
    """The picture of a `Source`, or of what `Picture.json` gave.

    Transparent pictures are on white, 16 bits become 8, rotations that a file states are done. Raises ValueError that
    begins with the name for what is no picture, damaged, animated or of more than MAX_PIXELS, and for a file that is
    not the one of the hash.
    """
    try:
        if isinstance(value, Picture):
            return value
        if isinstance(value, str | os.PathLike):
            return _file(os.fspath(value))
        is_array = hasattr(value, "__array__") and not isinstance(value, Image.Image)
        return _in_memory(_of_array(value) if is_array else value)
    except (OSError, SyntaxError, EOFError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None


def _file(text: str) -> Picture:
    """The picture of a path, or of the text that `Picture.json` makes of it."""
    recorded = re.fullmatch(r"(.*)#sha256=([0-9a-f]{64})", text, re.DOTALL)
    path, known = recorded.groups() if recorded else (text, None)
    if not path:
        raise ValueError("the picture was in memory, and is not known here: give it again")
    data = _bytes(path)
    sha256 = hashlib.sha256(data).hexdigest()
    if known not in (None, sha256):
        raise ValueError(f"{path}: is not the picture that was used, whose SHA-256 begins with {known[:12]}")
    return Picture(sha256, _decoded(path, data).size, path)


def _bytes(path: str) -> bytes:
    if not os.path.isfile(path):
        path = path if len(path) < LONGEST_PATH else f"{path[:LONGEST_PATH]}…"
        raise ValueError(f"{path}: {'is no file' if os.path.exists(path) else 'there is no such file'}")
    if os.path.getsize(path) > MAX_BYTES:
        raise ValueError(f"{path}: is larger than {MAX_BYTES:,} bytes")
    return Path(path).read_bytes()


def opened(path: str, data: bytes) -> Image.Image:
    """The picture, of which the header is read. Raises ValueError for what is none, animated or too large."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of fewer pixels than are allowed here
        try:
            Image.init()
            known = [name for name in FORMATS if name in Image.OPEN]  # AVIF is not in every build
            image = Image.open(io.BytesIO(data), formats=known)
            frames = getattr(image, "n_frames", 1)
        except Image.DecompressionBombError:
            raise ValueError(f"{path}: is of more than {MAX_PIXELS:,} pixels") from None
        except Exception:  # of many types, by codec
            raise ValueError(f"{path}: is no picture that can be read: {', '.join(FORMATS)}") from None
    if frames > 1 and image.format != "MPO":
        raise ValueError(f"{path}: is animated, of {frames} frames; give one picture")
    _check_size(f"{path}: ", image.size)
    return image


def _check_size(prefix: str, size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{prefix}is of {size[0]}x{size[1]}, more than {MAX_PIXELS:,} pixels")


def _decoded(path: str, data: bytes) -> Image.Image:
    with opened(path, data) as image:
        try:
            return _upright(image)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        except Exception as error:  # of many types, by codec
            raise ValueError(f"{path}: is damaged: {brief(str(error))}") from None


def _upright(image: Image.Image) -> Image.Image:
    """In RGB, turned as its EXIF says, on white where it is transparent."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.uint8(np.asarray(image, np.uint16).astype(np.float32) / 257 + 0.5))
    elif image.mode in ("I", "F"):
        raise ValueError(f"has values of 32 bits (mode {image.mode}), of no known range; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
    return image.convert("RGB")


def _of_array(value: Any) -> Image.Image:
    array = np.asarray(value)
    array = np.uint8(array) * 255 if array.dtype == bool else array
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or not array.size:
        raise ValueError(f"an array must be [H W], [H W 1], [H W 3] or [H W 4], not {list(array.shape)}")
    _check_size("", array.shape[1::-1])
    if np.issubdtype(array.dtype, np.floating):
        if not ((array >= 0) & (array <= 1)).all():
            raise ValueError("an array of floats must have values in 0..1")
        array = np.uint8(np.round(array * 255))
    if array.dtype != np.uint8:
        raise ValueError(f"an array must be uint8, or float in 0..1, not {array.dtype}")
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def _in_memory(value: Any) -> Picture:
    if not isinstance(value, Image.Image):
        raise ValueError(f"must be a file, a PIL picture or an array [H W 3], not {brief(value)}")
    if getattr(value, "n_frames", 1) > 1:
        raise ValueError(f"is animated, of {value.n_frames} frames; give one picture")
    _check_size("", value.size)
    image = _upright(value)
    size = np.uint32(image.size).tobytes()
    return Picture(hashlib.sha256(size + image.tobytes()).hexdigest(), image.size, image=image)
