"""Pictures to learn from: a drawing, or two side by side, placed at random over a background."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from captions import captions, is_held_out, pair_captions
from drawings import COLORS, DEFAULT_COLOR, PALETTE, Placement, compose, place, random_placement
from jax import Array

GROUNDS = [*PALETTE, None]
"""What a caption can say of the background; None: nothing, and it has the default colour."""

SINGLE = Placement(zoom=0.84), Placement(zoom=0.03, shift=0.02, tilt=0.08, light=0.2)
"""Mean and spread of a drawing that stands alone: little enough for the sketch of one upright to be near to all."""

SIDE = Placement(zoom=0.46), Placement(zoom=0.016, shift=0.01, tilt=0.08, light=0.2)
"""The same for each of two, about its own centre a quarter of the canvas to the left or to the right."""

OFFSET = 0.24


def random_single(key: Array, rgba: Array, size: int, chance: float) -> Array:
    """A drawing [S S 4] uint8 on a canvas [size size 4] in 0 to 1."""
    return place(rgba.astype(jnp.float32) / 255, size, random_placement(key, *SINGLE, chance))


def random_pair(key: Array, left: Array, right: Array, size: int, chance: float) -> Array:
    """Two drawings [S S 4] uint8 on one canvas [size size 4] in 0 to 1."""
    mean, spread = SIDE
    placed = []
    for k, rgba, x in zip(jax.random.split(key), (left, right), (-OFFSET, OFFSET), strict=True):
        placement = random_placement(k, mean._replace(shift=jnp.array([0.0, x])), spread, chance)
        placed.append(place(rgba.astype(jnp.float32) / 255, size, placement))
    return placed[0] + (1 - placed[0][..., 3:]) * placed[1]


def random_pictures(key: Array, rgba: Array, beside: Array, colors: Array, size: int, chance: float = 1.0) -> Array:
    """Drawings [B S S 4], the last P of them with others [P S S 4] on their right, over backgrounds [B 3].

    The result is [B size size 3] in -1 to 1. chance: how much of the spread of placements there is; with 0, every
    drawing has the mean one.
    """
    keys = jax.random.split(key, len(rgba))
    alone = len(rgba) - len(beside)
    singles = jax.vmap(lambda k, a: random_single(k, a, size, chance))(keys[:alone], rgba[:alone])
    pairs = jax.vmap(lambda k, a, b: random_pair(k, a, b, size, chance))(keys[alone:], rgba[alone:], beside)
    return 2 * compose(jnp.concatenate([singles, pairs]), colors) - 1


@dataclass(frozen=True)
class Scenes:
    """What B pictures show, by number: the last P of them two drawings.

    Attributes:
        drawings: [B], each by itself or on the left.
        beside: [P], on the right.
        grounds: [B], numbers in GROUNDS.
    """

    drawings: np.ndarray
    beside: np.ndarray
    grounds: np.ndarray

    @property
    def alone(self) -> int:
        """How many show one drawing."""
        return len(self.drawings) - len(self.beside)

    def colors(self) -> np.ndarray:
        """Of the backgrounds, [B, 3] in 0 to 1."""
        return COLORS[[list(PALETTE).index(GROUNDS[k] or DEFAULT_COLOR) for k in self.grounds]]

    def after(self, count: int) -> "Scenes":
        """All but the first `count`, which show one drawing each."""
        return Scenes(self.drawings[count:], self.beside, self.grounds[count:])

    def captions(self, names: Sequence[str], own_colors: Sequence[str | None]) -> list[list[str]]:
        """The ways to ask for each; own_colors: see `captions.own_color`."""
        one = zip(self.drawings[: self.alone], self.grounds[: self.alone], strict=True)
        two = zip(self.drawings[self.alone :], self.beside, self.grounds[self.alone :], strict=True)
        texts = [captions(names[n], GROUNDS[k], own_colors[n]) for n, k in one]
        return texts + [pair_captions((names[a], names[b]), GROUNDS[k]) for a, b, k in two]


def one_round(names: Sequence[str], number: int, batch: int, pairs: int) -> Iterator[Scenes]:
    """Every drawing by itself, and among every `batch` pictures `pairs` of two drawings.

    In as many rounds as there are GROUNDS, a drawing meets each once; none takes the place of those that are held out.
    """
    rng, N, K = np.random.default_rng(number), len(names), len(GROUNDS)
    for first in range(0, N, batch - pairs):
        alone = np.arange(first, min(first + batch - pairs, N))
        left, right = rng.integers(N, size=(2, pairs))
        drawings = np.concatenate([alone, left])
        turns = [(zlib.crc32(names[n].encode()) + number) % K for n in alone]
        wanted = np.concatenate([turns, rng.integers(K, size=pairs)]).astype(int)
        others = [*alone, *right]
        shown = zip(drawings, others, wanted, strict=True)
        yield Scenes(drawings, right, np.array([_allowed({names[a], names[b]}, k) for a, b, k in shown]))


def _allowed(names: set[str], ground: int) -> int:
    color = GROUNDS[ground]
    return GROUNDS.index(None) if color and any(is_held_out(name, color) for name in names) else ground
