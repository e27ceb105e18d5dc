"""The drawings that the embedded model learns, how they are placed, and the backgrounds they stand on."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image

from sdjax.files import replacing

PALETTE = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "red": (214, 40, 40),
    "orange": (247, 137, 20),
    "yellow": (250, 215, 60),
    "green": (46, 160, 67),
    "blue": (45, 105, 225),
    "purple": (125, 60, 180),
    "pink": (250, 160, 200),
    "brown": (120, 75, 40),
    "teal": (20, 165, 165),
}
"""The background colours a caption can name, sRGB 0 to 255."""

COLORS = np.array(list(PALETTE.values()), np.float32) / 255
"""The same in 0 to 1, [K, 3]."""

DEFAULT_COLOR = "white"
"""The background of a caption that names none."""


@dataclass(frozen=True)
class Drawings:
    """N drawings with transparent surroundings.

    Attributes:
        names: N names, in lower case where the language has it so.
        rgba: uint8 [N, S, S, 4], sRGB multiplied by alpha.
    """

    names: list[str]
    rgba: np.ndarray

    def save(self, path: Path) -> None:
        """Names, and the pictures as lossless WebP one after the other."""
        pictures = [_webp(rgba) for rgba in self.rgba]
        ends = np.cumsum([len(picture) for picture in pictures])
        webp = np.frombuffer(b"".join(pictures), np.uint8)
        with replacing(path) as temporary, open(temporary, "wb") as file:  # np.savez would add .npz to a bare name
            np.savez(file, names=np.array(self.names), webp=webp, ends=ends)

    @classmethod
    def load(cls, path: Path) -> "Drawings":
        with np.load(path) as file:
            pictures = np.split(file["webp"], file["ends"][:-1])
            return cls(file["names"].tolist(), np.stack([_pixels(picture.tobytes()) for picture in pictures]))


def _webp(rgba: np.ndarray) -> bytes:
    """Lossless; `exact` keeps colours that WebP, which knows nothing of premultiplication, would call hidden."""
    file = io.BytesIO()
    Image.fromarray(rgba).save(file, "WEBP", lossless=True, exact=True)
    return file.getvalue()


def _pixels(webp: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(webp)).convert("RGBA"))


class Placement(NamedTuple):
    """Where and how a drawing stands on the canvas; each number may be an array.

    Attributes:
        zoom: size relative to the canvas.
        shift: of the centre from the canvas's, [y, x] as a share of the canvas.
        tilt: radians, counter-clockwise.
        light: what the colours are multiplied by.
    """

    zoom: Array | float = 1.0
    shift: Array | float = 0.0
    tilt: Array | float = 0.0
    light: Array | float = 1.0


def random_placement(key: Array, mean: Placement, spread: Placement, chance: float) -> Placement:
    """mean + chance * spread * u with u even in [-1, 1] for every number."""
    parts = zip(jax.random.split(key, 4), ((), (2,), (), ()), mean, spread, strict=True)
    return Placement(*(m + chance * s * jax.random.uniform(k, shape, minval=-1) for k, shape, m, s in parts))


def place(rgba: Array, size: int, placement: Placement) -> Array:
    """A drawing on a transparent canvas: [S, S, 4] -> [size, size, 4], both in 0 to 1.

    Turned by linear interpolation at the drawing's own resolution, then resampled (antialiased, cubic).
    """
    source = rgba.shape[0]
    scale = jnp.broadcast_to(jnp.asarray(placement.zoom) * size / source, (2,))
    translation = size / 2 - source / 2 * scale + size * jnp.asarray(placement.shift)
    turned = turn(rgba, placement.tilt)
    placed = jax.image.scale_and_translate(turned, (size, size, 4), (0, 1), scale, translation, method="cubic")
    alpha = jnp.clip(placed[..., 3:], 0, 1)
    return jnp.concatenate([jnp.clip(placed[..., :3] * placement.light, 0, alpha), alpha], axis=-1)


def turn(picture: Array, angle: Array | float) -> Array:
    """A square picture [S, S, C] turned about its centre, counter-clockwise, transparent where nothing was."""
    centre = (picture.shape[0] - 1) / 2
    y, x = jnp.mgrid[: picture.shape[0], : picture.shape[1]] - centre
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    at = [cos * y + sin * x + centre, cos * x - sin * y + centre]
    channel = lambda plane: jax.scipy.ndimage.map_coordinates(plane, at, order=1)  # noqa: E731
    return jax.vmap(channel, in_axes=-1, out_axes=-1)(picture)


def compose(rgba: Array, color: Array) -> Array:
    """A drawing over a background: rgb + (1 - alpha) color, [..., H, W, 4] and [..., 3] -> [..., H, W, 3].

    rgba is multiplied by alpha; everything in 0 to 1.
    """
    return rgba[..., :3] + (1 - rgba[..., 3:]) * color[..., None, None, :]


def color_shares(rgba: np.ndarray) -> np.ndarray:
    """How much of a drawing [S, S, 4] is nearest to each colour of PALETTE: [K], together 1"""
    solid = rgba[rgba[..., 3] > 250][:, :3] / 255
    nearest = ((solid[:, None] - COLORS) ** 2).sum(-1).argmin(1)
    return np.bincount(nearest, minlength=len(PALETTE)) / max(len(solid), 1)
