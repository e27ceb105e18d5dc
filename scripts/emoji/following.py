"""Whether pictures have the edges that a ControlNet was shown."""

import argparse
from collections.abc import Sequence

import numpy as np
import recipe
from captions import captions
from controls import chosen, one_round_anywhere
from drawings import Drawings
from edges import agreement, canny
from PIL import Image
from retrieval import FIRST_SEED
from scenes import GROUNDS

import sdjax

STEPS, GUIDANCE, COUNT = 12, 3.0, 64


def measure(args: argparse.Namespace) -> None:
    """Prints the agreement of edges of 64 drawings that the ControlNet never saw, with it and without."""
    drawings = chosen(Drawings.load(args.work / "drawings.npz"), unseen=True)
    shown, pictures, _ = next(one_round_anywhere(drawings, recipe.CONTROL_ROUNDS))
    pictures, names = pictures[:COUNT], [drawings.names[n] for n in shown.drawings[:COUNT]]
    expected = [canny(picture) for picture in pictures]
    prompts = {
        "its own name": [captions(name, GROUNDS[k])[0] for name, k in zip(names, shown.grounds, strict=False)],
        "no prompt": [""] * len(names),
        "another's name": [captions(name, GROUNDS[k])[0] for name, k in zip(np.roll(names, 1), shown.grounds, strict=False)],
    }
    controlled = sdjax.StableDiffusionPipeline.from_pretrained(args.model, controlnet=args.out)
    for name, texts in prompts.items():
        for scale in (0.0, 1.0):
            made = draw(controlled, texts, expected, scale)
            found = [canny(picture) for picture in made]
            f1 = [np.mean([agreement(*pair, within) for pair in zip(found, expected, strict=True)]) for within in (1, 2)]
            print(f"{name}, scale {scale:g}: F1 {f1[0]:.3f} within 1 pixel, {f1[1]:.3f} within 2", flush=True)


def draw(
    pipe: sdjax.StableDiffusionPipeline, prompts: Sequence[str], edges: Sequence[np.ndarray], scale: float
) -> np.ndarray:
    """A picture for each prompt and its edges [H W], seeds from FIRST_SEED: [B H W 3] in 0 to 1"""
    shown = [Image.fromarray(np.uint8(255 * each)) for each in edges]
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "np"}
    seeds = range(FIRST_SEED, FIRST_SEED + len(prompts))
    return pipe(
        list(prompts), control_image=shown, controlnet_conditioning_scale=scale, seed=seeds, **options
    ).images
