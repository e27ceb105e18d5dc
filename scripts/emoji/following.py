"""Whether pictures have the edges that a ControlNet was shown: figures, and a sheet to look at."""

import argparse
from collections.abc import Sequence

import numpy as np
import recipe
from captions import captions
from controls import chosen, one_round_reshaped
from drawings import Drawings
from edges import agreement, canny
from PIL import Image, ImageDraw
from retrieval import FIRST_SEED
from scenes import GROUNDS

import sdjax

STEPS, GUIDANCE, COUNT = 12, 3.0, 64
SHOWN = slice(3, 60, 7)  # of the pictures that are measured
PROMPTS = ("a goose", "a red apple on a blue background", "a cat face on a yellow background", "")
GOOSE = """
30,18 38,12 48,14 53,22 54,34 52,48 56,58 68,56 84,58 98,64 112,62 108,76 98,88 84,94 76,95 77,106 84,110 64,110 68,96
54,92 44,82 40,68 42,52 44,38 42,30 34,28 20,30 22,24
"""
"""Points of an outline in a picture of 128x128"""


def measure(args: argparse.Namespace) -> None:
    """Prints how well the edges of pictures agree with those shown, of drawings that the ControlNet never saw."""
    drawings = chosen(Drawings.load(args.work / "drawings.npz"), unseen=True)
    shown, pictures, _ = next(one_round_reshaped(drawings, recipe.CONTROL_ROUNDS))
    names, grounds = [drawings.names[n] for n in shown.drawings][:COUNT], [GROUNDS[k] for k in shown.grounds][:COUNT]
    expected = [canny(picture) for picture in pictures[:COUNT]]
    prompts = {
        "the drawing's name": [captions(*asked)[0] for asked in zip(names, grounds, strict=True)],
        "another's name": [captions(*asked)[0] for asked in zip(np.roll(names, 1).tolist(), grounds, strict=True)],
        "no prompt": [""] * len(names),
    }
    pipe = sdjax.StableDiffusionPipeline.from_pretrained(args.model, controlnet=args.out)
    print("| prompt | weight | F1 within 1 pixel | within 2 |\n| --- | --- | --- | --- |")
    for label, texts in prompts.items():
        for weight in (0.0, 1.0):
            found = [canny(picture) for picture in draw(pipe, texts, expected, weight)]
            f1 = [np.mean([agreement(*both, n) for both in zip(found, expected, strict=True)]) for n in (1, 2)]
            print(f"| {label} | {weight:g} | {f1[0]:.3f} | {f1[1]:.3f} |", flush=True)


def sheet(args: argparse.Namespace) -> None:
    """Rows of sources, edges and what is drawn for PROMPTS without the ControlNet and with it: sheet.png"""
    drawings = chosen(Drawings.load(args.work / "drawings.npz"), unseen=True)
    _, pictures, _ = next(one_round_reshaped(drawings, recipe.CONTROL_ROUNDS))
    lines = by_hand()
    blank = np.ones((len(lines), *pictures.shape[1:]))
    sources = np.concatenate([pictures[SHOWN], blank])
    edges = [*(canny(picture) for picture in pictures[SHOWN]), *lines]
    pipe = sdjax.StableDiffusionPipeline.from_pretrained(args.model, controlnet=args.out)
    rows = [sources, np.repeat(np.float64(edges)[..., None], 3, axis=-1)]
    rows += [draw(pipe, [prompt] * len(edges), edges, weight) for prompt in PROMPTS for weight in (0.0, 1.0)]
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
