"""The raw packages to one data file of drawings and names."""

import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from sdjax.training.drawings import Drawings
from sdjax.training.names import is_flag, natural_name


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


def prepare(package: Path, table: dict[str, str], size: int, *, flags: bool = True) -> Drawings:
    """The drawings of an npm package tarball whose pictures are named by code points, under their natural names.

    table: official name -> name in captions, where `natural_name` alone does not do. flags: those of countries too.

    Raises:
        ValueError: the table has names that the package does not have, or two drawings have the same name.
    """
    official, found = emoji_names(), {}
    with tarfile.open(package) as tar:
        for member in tar:
            path = Path(member.name)
            code = plain_code(path.stem.split("-"))
            name = official.get(code) if path.suffix == ".webp" else None
            if name and name not in found and (flags or not is_flag(code)):
                picture = Image.open(io.BytesIO(tar.extractfile(member).read()))
                found[name] = table.get(name) or natural_name(name, code), premultiplied(picture, size)
    if missing := table.keys() - found.keys():
        raise ValueError(f"{package} has no drawing named {sorted(missing)}; correct the list of names")
    names, rgba = zip(*found.values(), strict=True)
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"several drawings are named {twice}; tell them apart in the list of names")
    return Drawings(list(names), np.stack(rgba))
