"""Whether pictures show what was asked: nearest neighbours among all drawings, whatever their placement."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from captions import captions, is_held_out
from drawings import COLORS, Drawings, Placement, compose, place, turn
from jax import Array
from PIL import Image
from scenes import GROUNDS, SINGLE

import sdjax

FIRST_SEED = 1000
SIDE = 32
MEAN, SPREAD = SINGLE


@dataclass(frozen=True)
class Asked:
    """Drawings by number, each with the number of a background in GROUNDS and what a prompt calls them."""

    drawings: np.ndarray
    colors: np.ndarray
    prompts: list[str]


def asked_for(names: Sequence[str], count: int, held_out: bool = False, among: Sequence[str] | None = None) -> Asked:
    """`count` names spread evenly over the set, or over those `among` it, the colours in turn.

    held_out: pairings of name and colour that training leaves out; or else those that it has.
    """
    pairs = []
    for i, name in enumerate(names):
        if among is None or name in among:
            turns = np.roll(range(len(COLORS)), -i)
            pairs += [(i, k) for k in turns if is_held_out(name, GROUNDS[k]) == held_out][:1]
    chosen = np.array(pairs)[np.linspace(0, len(pairs) - 1, count).round().astype(int)]
    return Asked(*chosen.T, [captions(names[n], GROUNDS[k])[0] for n, k in chosen])


def draw(pipe: sdjax.StableDiffusionPipeline, prompts: list[str], steps: int, guidance: float) -> np.ndarray:
    """One picture a prompt, seeds from FIRST_SEED: [B H W 3] in 0 to 1"""
    seeds = range(FIRST_SEED, FIRST_SEED + len(prompts))
    return pipe(prompts, num_inference_steps=steps, guidance_scale=guidance, seed=seeds, output_type="np").images


@dataclass
class Gallery:
    """All the drawings at 32x32.

    A picture is compared in every one of 225 placements around the middle of those that training has (3 sizes, 5x5
    shifts, 3 tilts); its distance to a drawing is the least of them (RGB over the asked background, Euclidean). Every
    drawing has the same chances, so placement neither helps nor hurts.
    """

    drawings: Drawings
    placed: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        shrink = lambda rgba: place(rgba / 255.0, SIDE, Placement(MEAN.zoom))  # noqa: E731
        self.placed = np.asarray(jax.jit(partial(jax.lax.map, shrink, batch_size=32))(jnp.asarray(self.drawings.rgba)))

    def rank(self, picture: np.ndarray, asked: int, color: int) -> int:
        """How many drawings are nearer to a picture [H W 3] than the asked one."""
        drawings = compose(self.placed, COLORS[color]).reshape(len(self.placed), -1)
        distance = _distances(jnp.asarray(picture), drawings, jnp.float32(border(picture)))
        return int((distance < distance[asked]).sum())

    def ranks(self, pictures: np.ndarray, asked: Asked) -> np.ndarray:
        """`rank` of each picture."""
        return np.array([self.rank(*each) for each in zip(pictures, asked.drawings, asked.colors, strict=True)])

    def scores(self, pictures: np.ndarray, asked: Asked) -> dict[str, float]:
        """The shares of pictures that are recognised first, among the first five, and of right backgrounds."""
        ranks = self.ranks(pictures, asked)
        grounds = np.array([border_color(picture) for picture in pictures])
        shares = {"top1": ranks < 1, "top5": ranks < 5, "background": grounds == asked.colors}
        return {name: float(share.mean()) for name, share in shares.items()}


@jax.jit
def _distances(picture: Array, drawings: Array, border: Array) -> Array:
    """The least squared distance of any placement of a picture [H W 3] to each drawing [N SIDE*SIDE*3]: [N]"""
    steps = jnp.linspace(-1, 1, 3)
    tilted = jax.vmap(lambda tilt: turn(picture - border, tilt))(SPREAD.tilt * 0.7 * steps)
    zooms = 1 / (1 + SPREAD.zoom / MEAN.zoom * steps)
    shifts = SPREAD.shift * jnp.linspace(-1, 1, 5)

    def placement(tilted: Array, zoom: Array, y: Array, x: Array) -> Array:
        scale = jnp.broadcast_to(zoom * SIDE / len(picture), (2,))
        offset = SIDE / 2 - len(picture) / 2 * scale + SIDE * jnp.stack([y, x])
        return jax.image.scale_and_translate(tilted, (SIDE, SIDE, 3), (0, 1), scale, offset, method="linear") + border

    for axis in range(4):
        placement = jax.vmap(placement, in_axes=[0 if i == 3 - axis else None for i in range(4)])
    x = placement(tilted, zooms, shifts, shifts).reshape(-1, drawings.shape[1])
    products = jnp.matmul(x, drawings.T, precision="highest")
    return (((x**2).sum(1)[:, None] - 2 * products) + (drawings**2).sum(1)).min(axis=0)


def border(picture: np.ndarray) -> np.ndarray:
    """The median colour of the outermost pixels: [H W 3] -> [3]"""
    edge = np.concatenate([picture[0], picture[-1], picture[1:-1, 0], picture[1:-1, -1]])
    return np.median(edge, axis=0)


def border_color(picture: np.ndarray) -> int:
    """The index of the palette colour that is nearest to the border's."""
    return int(((COLORS - border(picture)) ** 2).sum(axis=1).argmin())


def tiled(pictures: np.ndarray) -> Image.Image:
    """[B H W 3] in 0 to 1 -> one picture, as square as can be, white where there is none"""
    columns = int(np.ceil(len(pictures) ** 0.5))
    rows = -(-len(pictures) // columns)
    tiles = [Image.fromarray(np.uint8(picture * 255 + 0.5)) for picture in pictures]
    blank = Image.new("RGB", tiles[0].size, "white")
    return sdjax.image_grid(tiles + [blank] * (rows * columns - len(tiles)), rows, columns)
