"""Measures what work traded for time costs: `python scripts/emoji/trades.py --drawings train_emoji/drawings.npz`.

Pictures of the same prompts and seeds with every setting of TRADES: time for a picture, by the clock and of the
processor, as a part of that of the exact one; PSNR against the exact picture; how many are recognised (top-1, top-5:
`retrieval.Gallery`). The settings take turns, batch by batch; the first batch of each, which compiles, is not timed.
Then the decoder in tiles: drawings side by side in one picture, decoded as one and in tiles.
"""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from drawings import Drawings
from flax import nnx
from retrieval import FIRST_SEED, Gallery, asked_for

import sdjax
from sdjax.models import AutoencoderKL
from sdjax.pictures import pixels
from sdjax.runtime import tiling
from sdjax.training import losses

PAPER = (0.28, 5.42)  # the interval of arXiv:2404.07724 for SDXL
TRADES: dict[str, dict[str, Any]] = {
    "exact": {},
    "3/4 of the steps": {"steps": 3 / 4},
    "1/2 of the steps": {"steps": 1 / 2},
    "guidance at 0.28 to 5.42": {"guidance_interval": PAPER},
    "guidance from 0.28": {"guidance_interval": (PAPER[0], math.inf)},
    "guidance from 1": {"guidance_interval": (1, math.inf)},
    "guidance at 1 to 5.42": {"guidance_interval": (1, PAPER[1])},
    "every 2nd step in full": {"cache_interval": 2},
    "every 3rd step in full": {"cache_interval": 3},
    "every 5th step in full": {"cache_interval": 5},
    "guidance at 0.28 to 5.42, every 2nd step in full": {"guidance_interval": PAPER, "cache_interval": 2},
}
"""Arguments of the pipeline; steps: that part of them, what a trade has to be better than"""

BATCH = 16
MOSAIC = 4  # drawings along a side
TILES = (16, 24, 32, 48)  # latents along a side


def psnr(pictures: np.ndarray, exact: np.ndarray) -> float:
    """In dB, the mean over pictures [B H W 3] in 0 to 1."""
    return float(losses.psnr(jnp.asarray(2 * pictures - 1), 2 * exact - 1))


def draw(
    pipe: sdjax.StableDiffusionPipeline, prompts: Sequence[str], steps: int, guidance: float
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Pictures [N H W 3] with each setting; seconds by the clock and of the processor for each batch but the first."""
    pictures = {name: [] for name in TRADES}
    seconds = {name: [] for name in TRADES}
    for first in range(0, len(prompts), BATCH):
        part = prompts[first : first + BATCH]
        for name, trade in TRADES.items():
            count = round(steps * trade.get("steps", 1))
            options = {option: value for option, value in trade.items() if option != "steps"}
            began = np.array([time.perf_counter(), time.process_time()])
            made = pipe(
                part,
                num_inference_steps=count,
                guidance_scale=guidance,
                seed=range(FIRST_SEED + first, FIRST_SEED + first + len(part)),
                output_type="np",
                **options,
            )
            seconds[name].append(np.array([time.perf_counter(), time.process_time()]) - began)
            pictures[name].append(made.images)
    joined = {name: np.concatenate(parts) for name, parts in pictures.items()}
    return joined, {name: np.array(each[1:]) for name, each in seconds.items()}


def mosaic(tiles: np.ndarray) -> np.ndarray:
    """[n^2 H W C] -> [n H, n W, C], row by row"""
    n = math.isqrt(len(tiles))
    rows = tiles.reshape(n, n, *tiles.shape[1:]).swapaxes(1, 2)
    return rows.reshape(n * tiles.shape[1], n * tiles.shape[2], -1)


def decode(vae: AutoencoderKL, latents: np.ndarray, tile: int) -> np.ndarray:
    """[B h w C] -> [B H W 3] in 0 to 1"""
    graph, params = nnx.split(vae)
    run = jax.jit(lambda params, z: tiling.decode_tiled(nnx.merge(graph, params).decode, z, tile=tile))
    return pixels.denormalize(np.asarray(run(params, latents / vae.config.scaling_factor)))


def compare_tiles(pipe: sdjax.StableDiffusionPipeline, prompts: Sequence[str], folder: Path | None) -> None:
    """Prints how a picture of drawings side by side, in tiles, differs from that in one tile, and from the drawings."""
    count = MOSAIC**2
    made = pipe(prompts[:count], num_inference_steps=25, guidance_scale=3, seed=FIRST_SEED, output_type="latent")
    latents = mosaic(made.images)[None]
    alone = mosaic(decode(pipe.vae, made.images, made.images.shape[1]))[None]
    one, *_ = sides = (latents.shape[1], *TILES)
    pictures = {side: decode(pipe.vae, latents, side) for side in sides}
    print(f"\n{count} drawings in a picture of {alone.shape[1]} x {alone.shape[2]} pixels\n")
    print("| latents in a tile | PSNR against one tile | PSNR against each drawing alone |\n| --- | --- | --- |")
    for side, picture in pictures.items():
        print(f"| {side}x{side} | {psnr(picture, pictures[one]):.1f} dB | {psnr(picture, alone):.1f} dB |")
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            pixels.to_pil(2 * picture - 1)[0].save(folder / f"tiles-{side}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of the model; the embedded one if not given")
    parser.add_argument("--drawings", type=Path, default=Path("train_emoji/drawings.npz"), help="the prepared data")
    parser.add_argument(
        "--count", type=int, default=96, help=f"names, spread over the whole set; a multiple of {BATCH}"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[25, 50])
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0, 7.5])
    parser.add_argument("--tiles", type=Path, help="a folder for the pictures that are decoded in tiles")
    args = parser.parse_args()

    if args.count < 2 * BATCH or args.count % BATCH:
        parser.error(f"--count {args.count}: batches are of {BATCH}, and the first is not timed; give a multiple")

    drawings = Drawings.load(args.drawings)
    gallery, asked = Gallery(drawings), asked_for(drawings.names, args.count)
    pipe = sdjax.StableDiffusionPipeline.from_pretrained(args.model)
    for steps in args.steps:
        for guidance in args.guidance:
            pictures, seconds = draw(pipe, asked.prompts, steps, guidance)
            exact = np.median(seconds["exact"], axis=0)
            print(f"\n{args.count} names, {steps} steps, guidance {guidance:g}: {exact[0] / BATCH:.3f} s a picture\n")
            print("| setting | time | processor time | PSNR | top-1 | top-5 |\n| --- | --- | --- | --- | --- | --- |")
            for name, made in pictures.items():
                clock, processor = np.median(seconds[name] / seconds["exact"], axis=0)
                scores = gallery.scores(made, asked)
                print(
                    f"| {name} | {clock:.2f} | {processor:.2f} | {psnr(made, pictures['exact']):.1f} dB "
                    f"| {scores['top1']:.0%} | {scores['top5']:.0%} |",
                    flush=True,
                )
    compare_tiles(pipe, asked.prompts, args.tiles)


if __name__ == "__main__":
    main()
