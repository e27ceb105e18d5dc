"""What shows in the cells of notebooks: progress, previews, tables. IPython is there in every notebook, and not needed
elsewhere."""

from functools import partial

from sdjax.lazy import attribute

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

__getattr__ = partial(attribute, __name__, HOME)  # a pipeline's progress needs no pipeline
