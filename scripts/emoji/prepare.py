"""The raw package to one data file of drawings and names."""

import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
from drawings import Drawings
from names import emoji_names, natural_name, plain_code
from PIL import Image


def premultiplied(picture: Image.Image, size: int) -> np.ndarray:
    """A picture fitted into a square and resampled with colours multiplied by alpha: uint8 [size, size, 4].

    Without the multiplication the colours of invisible pixels bleed into the edges.
    """
    picture = picture.convert("RGBA")
    side = max(picture.size)
    square = Image.new("RGBA", (side, side))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(square.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS))


def prepare(package: Path, table: dict[str, str], size: int) -> Drawings:
    """The drawings of an npm package tarball whose pictures are named by code points, under their natural names.

    table: official name -> name in captions, where `natural_name` alone does not do.

    Raises:
        ValueError: the table has names that the package does not have, or two drawings have the same name.
    """
    official, found = emoji_names(), {}
    with tarfile.open(package) as tar:
        for member in tar:
            path = Path(member.name)
            name = official.get(plain_code(path.stem.split("-"))) if path.suffix == ".webp" else None
            if name and name not in found:
                picture = Image.open(io.BytesIO(tar.extractfile(member).read()))
                found[name] = table.get(name) or natural_name(name), premultiplied(picture, size)
    if missing := table.keys() - found.keys():
        raise ValueError(f"{package} has no drawing named {sorted(missing)}; correct the list of names")
    names, rgba = zip(*found.values(), strict=True)
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"several drawings are named {twice}; tell them apart in the list of names")
    return Drawings(list(names), np.stack(rgba))
