"""The natural spelling of emoji names: "man red hair" is a man with red hair."""

import re
from collections.abc import Iterable
from pathlib import Path

RULES = (
    (r" \(.*\)$", ""),
    (r"\u2019", "'"),
    (r" & ", " and "),
    (r"^(\w+) o'clock$", r"clock showing \1 o'clock"),
    (r"^(\w+)-thirty$", r"clock showing half past \1"),
    (r"^(man|woman|person) (red|curly|white|blond) hair$", r"\1 with \2 hair"),
    (r"^(man|woman|person) bald$", r"bald \1"),
    (r"^(man|woman|person) beard$", r"\1 with a beard"),
    (r"^kiss (man|woman) (man|woman)$", r"kiss between a \1 and a \2"),
    (r"^couple with heart (man|woman) (man|woman)$", r"\1 and \2 with a heart"),
    (r"^family (.+) (\w+)$", r"family of a \1 and a \2"),
    (r"(?<=^family of a )(\w+) (\w+) and", r"\1, a \2 and"),
    (r"(?<=^family of a )(\w+) (\w+) (\w+) and", r"\1, a \2, a \3 and"),
)
"""Patterns and what they become, one after the other."""


def natural_name(name: str) -> str:
    """What a caption calls the emoji of this official name."""
    for pattern, replacement in RULES:
        name = re.sub(pattern, replacement, name)
    return name


def read_names(path: Path) -> dict[str, str]:
    """Lines of `official name: name in captions`, for emoji that the rules do not name well."""
    return dict(line.split(": ") for line in path.read_text(encoding="utf-8").splitlines() if line)


def emoji_names() -> dict[str, str]:
    """Official English names by code points, as in "1fabf": "goose".

    From the package `emoji`, without those with a skin tone and the flags of countries.
    """
    from emoji import EMOJI_DATA

    names = {}
    for characters, entry in EMOJI_DATA.items():
        name = entry["en"].strip(":").replace("_", " ")
        is_flag = all("\U0001f1e6" <= c <= "\U0001f1ff" for c in characters)  # of regional indicators
        if "skin tone" not in name and not is_flag:
            names.setdefault(plain_code(f"{ord(c):x}" for c in characters), name)
    return names


def plain_code(points: Iterable[str]) -> str:
    """Code points joined by "-", without the variation selector fe0f: file names do not agree on it."""
    return "-".join(point for point in points if point != "fe0f")
