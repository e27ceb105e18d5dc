"""Whether JAX and Flax are as new as sdjax needs them, found out before either is imported."""

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version

CHECKED = ("jax", "flax")


@cache
def outdated() -> str | None:
    """One line that says which of them is too old, and what to install; None: neither is.

    The versions needed are those that sdjax's own metadata names. Without metadata nothing is checked.
    """
    try:
        lines = requires("sdjax") or ()
        needed = {found[1]: found[2] for line in lines if (found := re.match(r"(\w+)>=([\d.]+)$", line))}
        old = [name for name in CHECKED if name in needed and _numbers(version(name)) < _numbers(needed[name])]
    except PackageNotFoundError:
        return None
    if not old:
        return None
    wanted = " ".join(f'"{name}>={needed[name]}"' for name in old)
    return f"sdjax needs {wanted}, and {', '.join(f'{name} {version(name)}' for name in old)} is installed: " + (
        f"pip install -U {wanted}"
    )


def _numbers(name: str) -> tuple[int, ...]:
    """Of a version, the numbers that it begins with."""
    return tuple(map(int, re.findall(r"\d+", re.match(r"[\d.]*", name)[0])))
