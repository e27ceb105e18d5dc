"""Measures whether a model draws what it is asked: `python scripts/eval_emoji.py --drawings train_emoji/drawings.npz`.

For 100 names, each with a background colour and a seed: the nearest neighbour of the picture among all the drawings
over the asked background (32x32 RGB, Euclidean) carries the asked name (top-1), or one of the nearest five does
(top-5); the palette colour nearest to the picture's border is the asked one (background).
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image

import sdjax
from sdjax.training.drawings import PALETTE, Drawings, captions, compose, palette, place

FIRST_SEED = 1000
SIDE = 32


def references(drawings: Drawings, zoom: float) -> np.ndarray:
    """The drawings as the model learns to place them, [N SIDE SIDE 4], 0 to 1, multiplied by alpha."""
    shrink = jax.jit(jax.vmap(lambda rgba: place(rgba, SIDE, zoom)))
    return np.asarray(shrink(np.float32(drawings.rgba) / 255))


def as_image(picture: np.ndarray) -> Image.Image:
    """[H W 3] in 0 to 1 -> PIL"""
    return Image.fromarray(np.uint8(picture * 255 + 0.5))


def shrunk(picture: np.ndarray) -> np.ndarray:
    """[H W 3] in 0 to 1 -> [SIDE SIDE 3]"""
    image = as_image(picture).resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(image, np.float32) / 255


def rank(picture: np.ndarray, drawings: np.ndarray, color: np.ndarray, asked: int) -> int:
    """How many drawings over the colour are nearer to the picture than the asked one."""
    distance = ((compose(drawings, color) - shrunk(picture)) ** 2).sum(axis=(1, 2, 3))
    return int((distance < distance[asked]).sum())


def border_color(picture: np.ndarray) -> int:
    """The index of the palette colour that is nearest to the median of the outermost pixels."""
    edge = np.concatenate([picture[0], picture[-1], picture[1:-1, 0], picture[1:-1, -1]])
    return int(((palette() - np.median(edge, axis=0)) ** 2).sum(axis=1).argmin())


def tiled(pictures: np.ndarray) -> Image.Image:
    """[B H W 3] in 0 to 1 -> one picture, as square as can be, white where there is none"""
    columns = int(np.ceil(len(pictures) ** 0.5))
    rows = -(-len(pictures) // columns)
    tiles = [as_image(picture) for picture in pictures]
    blank = Image.new("RGB", tiles[0].size, "white")
    return sdjax.image_grid(tiles + [blank] * (rows * columns - len(tiles)), rows, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of the model; the embedded one if not given")
    parser.add_argument("--drawings", type=Path, default=Path("train_emoji/drawings.npz"), help="the prepared data")
    parser.add_argument("--count", type=int, default=100, help="names, spread over the whole set")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--zoom", type=float, default=0.95, help="mean size of the drawings in training")
    parser.add_argument("--sampler")
    parser.add_argument("--grid", type=Path, default=Path("emoji_grid.png"))
    args = parser.parse_args()

    drawings = Drawings.load(args.drawings)
    placed = references(drawings, args.zoom)
    asked = np.linspace(0, len(drawings.names) - 1, args.count).round().astype(int)
    colors = np.arange(args.count) % len(PALETTE)
    prompts = [captions(drawings.names[n], list(PALETTE)[k])[0] for n, k in zip(asked, colors, strict=True)]
    seeds = range(FIRST_SEED, FIRST_SEED + args.count)

    pipe = sdjax.StableDiffusionPipeline.from_pretrained(args.model)
    began = time.perf_counter()
    pictures = pipe(
        prompts,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        seed=seeds,
        scheduler=args.sampler,
        output_type="np",
    ).images
    seconds = time.perf_counter() - began

    ranks = np.array([rank(p, placed, palette()[k], n) for p, n, k in zip(pictures, asked, colors, strict=True)])
    grounds = np.array([border_color(p) for p in pictures])
    for prompt, r, ground in zip(prompts, ranks, grounds, strict=True):
        print(f"{prompt:60} rank {r + 1:4}   background {list(PALETTE)[ground]}")
    print(f"{args.count} names, {args.steps} steps, guidance {args.guidance:g}, {seconds:.1f} s")
    top1, top5, background = np.mean(ranks < 1), np.mean(ranks < 5), np.mean(grounds == colors)
    print(f"top-1 {top1:.1%}   top-5 {top5:.1%}   background {background:.1%}")
    tiled(pictures).save(args.grid)
    print(args.grid)


if __name__ == "__main__":
    main()
