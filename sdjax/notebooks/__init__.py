"""What shows in the cells of notebooks: progress, previews, tables. IPython is there in every notebook, and not needed
elsewhere."""

from importlib import import_module
from typing import Any

HOME = {
    "Place": "sdjax.notebooks.cell",
    "Previews": "sdjax.notebooks.previews",
    "Server": "sdjax.notebooks.server",
    "at_once": "sdjax.notebooks.sweeps",
    "draw": "sdjax.notebooks.sweeps",
    "runs_on": "sdjax.notebooks.machine",
    "sweep": "sdjax.notebooks.sweeps",
}

__all__ = [*HOME]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for: a pipeline's progress needs no pipeline."""
    if name not in HOME:
        raise AttributeError(f"module 'sdjax.notebooks' has no attribute {name!r}")
    return getattr(import_module(HOME[name]), name)
