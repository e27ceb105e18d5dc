"""Folders of small pictures that are drawn here."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((40, 40), (64, 32), (32, 64), (48, 36))


def picture(seed: int, size: tuple[int, int] = (40, 40)) -> Image.Image:
    """A smooth picture, another for each seed."""
    array = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(array).resize(size, Image.Resampling.BICUBIC)


def folder(path: Path, sizes: tuple[tuple[int, int], ...] = SIZES) -> Path:
    """A folder of pictures 0.png, … with captions beside them."""
    path.mkdir(parents=True, exist_ok=True)
    for seed, size in enumerate(sizes):
        picture(seed, size).save(path / f"{seed}.png")
        (path / f"{seed}.txt").write_text(f"picture {seed}, red, blue\n")
    return path


def pairs(path: Path, count: int = 2) -> Path:
    """Pictures with what a ControlNet is shown, and metadata.jsonl."""
    path.mkdir(parents=True, exist_ok=True)
    lines = []
    for seed in range(count):
        picture(seed).save(path / f"{seed}.png")
        picture(seed + 100).save(path / f"edges{seed}.png")
        names = {"file_name": f"{seed}.png", "conditioning_image": f"edges{seed}.png"}
        lines.append(json.dumps({**names, "text": f"picture {seed}"}))
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return path
