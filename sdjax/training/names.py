"""The natural spelling of emoji names: "man red hair" is a man with red hair, "France" with a flag's code its flag."""

import re
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

WITH_THE = re.compile(r"^(United |Isle |Central |Dominican |Vatican|.* (Islands|Republic|Territories|Territory)$)")
WITH_THE_TOO = frozenset({"Bahamas", "Comoros", "Maldives", "Netherlands", "Philippines", "Gambia"})


def natural_name(name: str, code: str) -> str:
    """What a caption calls the emoji of this official name and code points ("1f1eb-1f1f7")."""
    for pattern, replacement in RULES:
        name = re.sub(pattern, replacement, name)
    return f"flag of {_with_the(name)}" if is_flag(code) else name


def is_flag(code: str) -> bool:
    """Whether these are two regional indicators: the flag of a country."""
    return all(0x1F1E6 <= int(point, 16) <= 0x1F1FF for point in code.split("-"))


def _with_the(country: str) -> str:
    return f"the {country}" if WITH_THE.match(country) or country in WITH_THE_TOO else country


def read_names(path: Path) -> dict[str, str]:
    """Lines of `emoji name: name in captions`."""
    return dict(line.split(": ") for line in path.read_text(encoding="utf-8").splitlines() if line)
