"""Measures whether a model draws what it is asked: `python scripts/emoji/measure.py --drawings drawings.npz`.

For 200 names spread over the set, each with a background and a seed from 1000 on: the drawing nearest to the picture
carries the asked name (top-1), or one of the nearest five does (top-5), see `retrieval.Gallery`; the palette colour
nearest to the picture's border is the asked one (background). The same for pairings of name and background that
training left out, for several step counts, and the PSNR of the VAE on the drawings.
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np
from drawings import COLORS, Drawings
from retrieval import Gallery, asked_for, draw, tiled
from scenes import random_pictures

import sdjax
from sdjax.training import losses


def vae_psnr(vae: sdjax.AutoencoderKL, drawings: Drawings, count: int = 256) -> float:
    """The mean over randomly placed drawings spread over the set, one in eight a pair, on all backgrounds in turn."""
    chosen = np.linspace(0, len(drawings.names) - 1, count).round().astype(int)
    size = vae.config.sample_size
    reconstruct = jax.jit(lambda x: losses.psnr(vae.decode(vae.encode(x).mode()), x))
    values = []
    for i, part in enumerate(np.split(chosen, count // 32)):
        rgba, colors = drawings.rgba[part], COLORS[part % len(COLORS)]
        values.append(reconstruct(random_pictures(jax.random.key(i), rgba, rgba[:4], colors, size)))
    return float(np.mean(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of the model; the embedded one if not given")
    parser.add_argument("--drawings", type=Path, default=Path("train_emoji/drawings.npz"), help="the prepared data")
    parser.add_argument("--names", type=Path, help="a file of names, one a line, to ask for; all if not given")
    parser.add_argument("--count", type=int, default=200, help="names, spread over the whole set")
    parser.add_argument("--steps", type=int, nargs="+", default=[25])
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--sampler")
    parser.add_argument("--held-out", action="store_true", help="also pairings that training left out")
    parser.add_argument("--grid", type=Path, default=Path("emoji_grid.png"))
    args = parser.parse_args()

    drawings = Drawings.load(args.drawings)
    gallery = Gallery(drawings)
    among = args.names.read_text(encoding="utf-8").splitlines() if args.names else None
    pipe = sdjax.StableDiffusionPipeline.from_pretrained(args.model, scheduler=args.sampler)
    print(f"VAE {vae_psnr(pipe.vae, drawings):.2f} dB")
    sets = [asked_for(drawings.names, args.count, held_out, among) for held_out in (False, True)[: 1 + args.held_out]]
    for label, asked in zip(("seen", "held out"), sets, strict=False):
        for steps in args.steps:
            began = time.perf_counter()
            pictures = draw(pipe, asked.prompts, steps, args.guidance)
            seconds = time.perf_counter() - began
            scores = "   ".join(f"{name} {share:.1%}" for name, share in gallery.scores(pictures, asked).items())
            print(f"{label}, {steps} steps, guidance {args.guidance:g}, {seconds:.0f} s: {scores}", flush=True)
            path = args.grid.with_stem(f"{args.grid.stem}-{label.replace(' ', '-')}-{steps}")
            tiled(pictures).save(path)
            print(path)


if __name__ == "__main__":
    main()
