"""The raw packages to one data file of drawings and names."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from sdjax.training.drawings import Drawings


def emoji_names() -> dict[str, str]:
    """English names by code points, as in "1fabf": "goose"; emoji with a skin tone are left out.

    From the package `emoji`. The variation selector fe0f does not count, because file names do not agree on it.
    """
    from emoji import EMOJI_DATA

    names = {}
    for characters, entry in EMOJI_DATA.items():
        name = entry["en"].strip(":").replace("_", " ")
        if "skin tone" not in name:
            names.setdefault(plain_code(f"{ord(c):x}" for c in characters), name)
    return names


def plain_code(points) -> str:
    """Code points joined by "-", without the variation selector."""
    return "-".join(point for point in points if point != "fe0f")


def premultiplied(picture: Image.Image, size: int) -> np.ndarray:
    """A picture fitted into a square and resampled with colours multiplied by alpha: uint8 [size, size, 4].

    Without the multiplication the colours of invisible pixels bleed into the edges.
    """
    picture = picture.convert("RGBA")
    side = max(picture.size)
    square = Image.new("RGBA", (side, side))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(square.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS))


def read_wanted(path: Path) -> dict[str, str]:
    """A list of names, one a line, `emoji name` or `emoji name: name in captions` -> {emoji name: caption name}."""
    pairs = (line.split(": ") for line in path.read_text().splitlines() if line)
    return {pair[0]: pair[-1] for pair in pairs}


def prepare(package: Path, wanted: dict[str, str], size: int) -> Drawings:
    """The wanted drawings of an npm package tarball whose pictures are named by code points.

    Raises:
        ValueError: names that the package does not have.
    """
    names, found = emoji_names(), {}
    with tarfile.open(package) as tar:
        for member in tar:
            path = Path(member.name)
            name = names.get(plain_code(path.stem.split("-")))
            if path.suffix == ".webp" and name in wanted and name not in found:
                found[name] = premultiplied(Image.open(io.BytesIO(tar.extractfile(member).read())), size)
    if missing := wanted.keys() - found.keys():
        raise ValueError(f"{package} has no drawing named {sorted(missing)}; correct the list of names")
    return Drawings([wanted[name] for name in wanted], np.stack([found[name] for name in wanted]))
