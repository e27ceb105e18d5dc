"""The drawings that the embedded model learns, their captions, and the backgrounds they stand on."""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

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

DEFAULT_COLOR = "white"
"""The background of a caption that names none."""

CONSONANT_SOUND = ("uni", "uk", "eu", "one-")
NO_ARTICLE = frozenset(
    {"bacon", "beans", "blueberries", "cheese", "cherries", "corn", "french fries", "glasses", "grapes", "jeans"}
    | {"pancakes", "peanuts", "popcorn", "scissors", "socks", "sunglasses", "yarn", "bread", "fire", "chopsticks"}
)


def with_article(name: str) -> str:
    """The name after "a" or "an", by its first sound; plurals and substances stand alone."""
    if name in NO_ARTICLE:
        return name
    vowel = name[0].lower() in "aeiou" and not name.lower().startswith(CONSONANT_SOUND)
    return f"{'an' if vowel else 'a'} {name}"


def captions(name: str, color: str | None) -> list[str]:
    """The ways to ask for a drawing: with and without the article, on the named background if there is one."""
    ground = "" if color is None else f" on {with_article(color)} background"
    return [with_article(name) + ground, name + ground]


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
        np.savez_compressed(path, names=np.array(self.names), rgba=self.rgba)

    @classmethod
    def load(cls, path: Path) -> "Drawings":
        with np.load(path) as file:
            return cls(file["names"].tolist(), file["rgba"])


def place(rgba: Array, size: int, zoom: Array | float = 1.0, shift: Array | float = 0.0) -> Array:
    """A drawing resampled (antialiased, cubic) into a square canvas: [S, S, 4] -> [size, size, 4].

    zoom: its size relative to the canvas; shift: of its centre from the canvas's, [y, x] in pixels of the canvas.
    """
    source = rgba.shape[0]
    scale = jnp.broadcast_to(jnp.asarray(zoom) * size / source, (2,))
    translation = size / 2 - source / 2 * scale + shift
    placed = jax.image.scale_and_translate(rgba, (size, size, 4), (0, 1), scale, translation, method="cubic")
    return jnp.clip(placed, 0, 1)


def compose(rgba: Array, color: Array) -> Array:
    """A drawing over a background: rgb + (1 - alpha) color, [..., H, W, 4] and [..., 3] -> [..., H, W, 3].

    rgba is multiplied by alpha; everything in 0 to 1.
    """
    return rgba[..., :3] + (1 - rgba[..., 3:]) * color[..., None, None, :]


def palette() -> np.ndarray:
    """The colours of PALETTE in its order, float32 [K, 3] in 0 to 1."""
    return np.array(list(PALETTE.values()), np.float32) / 255
