"""Public names of packages, imported when they are first asked for."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def attribute(package: str, home: Mapping[str, str], name: str) -> Any:
    """What a package has by this name, from the module that its home is. Raises AttributeError where it has none.

    `__getattr__ = partial(attribute, __name__, HOME)`
    """
    if name not in home:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(import_module(home[name]), name)
