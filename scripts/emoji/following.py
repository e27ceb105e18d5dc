"""Whether pictures have the edges that a ControlNet was shown: figures, and a sheet to look at."""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import recipe
from captions import captions
from controls import chosen, one_round_reshaped
from drawings import Drawings
from edges import agreement, canny
from flax import nnx
from PIL import Image, ImageDraw
from retrieval import FIRST_SEED
from scenes import GROUNDS

import sdjax

STEPS, GUIDANCE, COUNT = 12, 3.0, 64
SHOWN = slice(3, 60, 7)  # of the pictures that are measured
PROMPTS = ("a goose", "a red apple on a blue background", "")
BY_HAND = ("a red apple", "a star on a blue background", "a goose")
GOOSE = """
30,18 38,12 48,14 53,22 54,34 52,48 56,58 68,56 84,58 98,64 112,62 108,76 98,88 84,94 76,95 77,106 84,110 64,110 68,96
54,92 44,82 40,68 42,52 44,38 42,30 34,28 20,30 22,24
"""
"""Points of an outline in a picture of 128x128"""


class Unseen(NamedTuple):
    """Drawings that the ControlNet never saw, in new shapes."""

    pictures: np.ndarray
    """[N H W 3] in 0 to 1"""
    names: list[str]
    grounds: list[str | None]

    @classmethod
    def read(cls, args: argparse.Namespace) -> "Unseen":
        """The first COUNT that there are."""
        drawings = chosen(Drawings.load(args.work / "drawings.npz"), unseen=True)
        shown, pictures, _ = next(one_round_reshaped(drawings, recipe.CONTROL_ROUNDS))
        names, grounds = [drawings.names[n] for n in shown.drawings], [GROUNDS[k] for k in shown.grounds]
        return cls(pictures[:COUNT], names[:COUNT], grounds[:COUNT])

    def prompts(self, turn: int = 0) -> list[str]:
        """What is shown; turn: by the name of the one that is so many places before."""
        names = np.roll(self.names, turn).tolist()
        return [captions(*asked)[0] for asked in zip(names, self.grounds, strict=True)]


def measure(args: argparse.Namespace) -> None:
    """Prints how well the edges of pictures agree with those shown, of drawings that the ControlNet never saw."""
    unseen = Unseen.read(args)
    expected = [canny(picture) for picture in unseen.pictures]
    prompts = {"its name": unseen.prompts(), "another's": unseen.prompts(1), "none": [""] * len(expected)}
    pipe = sdjax.StableDiffusionPipeline.from_pretrained(args.model, controlnet=args.out)
    print("| prompt | weight | F1 within 1 pixel | within 2 |\n| --- | --- | --- | --- |")
    for label, texts in prompts.items():
        for weight in (0.0, 1.0):
            print(f"| {label} | {weight:g} | {agreements(draw(pipe, texts, expected, weight), expected)} |", flush=True)
    copies = nnx.jit(lambda vae, x: vae.decode(vae.encode(x).mode()))(pipe.vae, 2 * unseen.pictures - 1)
    print(f"| the VAE's copies | | {agreements(np.asarray(copies) / 2 + 0.5, expected)} |")


def agreements(pictures: np.ndarray, expected: Sequence[np.ndarray]) -> str:
    """The mean F1 of edges of pictures [N H W 3] in 0 to 1 within 1 pixel and within 2, as cells of a table."""
    found = [canny(picture) for picture in pictures]
    means = [np.mean([agreement(*both, n) for both in zip(found, expected, strict=True)]) for n in (1, 2)]
    return " | ".join(f"{mean:.3f}" for mean in means)


def sheet(args: argparse.Namespace) -> None:
    """Sources, edges and what is drawn for each prompt without the ControlNet and with it, row by row: sheet.png"""
    unseen, lines = Unseen.read(args), by_hand()
    pictures, own = unseen.pictures[SHOWN], unseen.prompts()[SHOWN]
    edges = [*(canny(picture) for picture in pictures), *lines]
    blank = np.ones((len(lines), *pictures.shape[1:]))
    pipe = sdjax.StableDiffusionPipeline.from_pretrained(args.model, controlnet=args.out)
    rows = [np.concatenate([pictures, blank]), np.repeat(np.float64(edges)[..., None], 3, axis=-1)]
    for prompts in ([*own, *BY_HAND], *([prompt] * len(edges) for prompt in PROMPTS)):
        rows += [draw(pipe, prompts, edges, weight) for weight in (0.0, 1.0)]
    picture = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
    Image.fromarray(np.uint8(255 * picture + 0.5)).save(args.work / "sheet.png")


def by_hand() -> list[np.ndarray]:
    """Outlines that are no drawing's: a circle, a star and a goose, bool [H W]"""
    size = recipe.SIZE
    turns = np.pi * (np.arange(10) / 5 - 1 / 2)
    radii = size * np.where(np.arange(10) % 2, 0.18, 0.42)
    star = size / 2 + np.stack([radii * np.cos(turns), radii * np.sin(turns)], axis=-1)
    goose = np.float64([point.split(",") for point in GOOSE.split()]) * size / 128
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    circle = size / 2 + 0.36 * size * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    return [outline(points, size) for points in (circle, star, goose)]


def outline(points: np.ndarray, size: int) -> np.ndarray:
    """The closed line through points [N 2] (x, y), two pixels wide: bool [size size]"""
    picture = Image.new("1", (size, size))
    corners = [tuple(point) for point in points]
    ImageDraw.Draw(picture).line([*corners, corners[0]], fill=1, width=2)
    return np.asarray(picture)


def draw(
    pipe: sdjax.StableDiffusionPipeline, prompts: Sequence[str], edges: Sequence[np.ndarray], weight: float
) -> np.ndarray:
    """A picture for each prompt and its edges bool [H W], seeds from FIRST_SEED: [B H W 3] in 0 to 1"""
    made = pipe(
        list(prompts),
        control_image=[Image.fromarray(np.uint8(255 * each)) for each in edges],
        controlnet_conditioning_scale=weight,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        seed=range(FIRST_SEED, FIRST_SEED + len(prompts)),
        output_type="np",
    )
    return made.images
