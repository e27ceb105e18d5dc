"""Places in the output of a notebook's cell."""

import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any


@dataclass(frozen=True)
class Markup:
    """What a notebook shows as HTML, and everything else as text."""

    html: str
    text: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def is_notebook() -> bool:
    """Whether this process is the kernel of a notebook (Jupyter, Colab, Kaggle)."""
    return getattr(_shell(), "kernel", None) is not None


def _shell() -> Any:
    return getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()


class Place:
    """One place in the output of the cell that first shows something here; each thing shown replaces the last.

    Outside of notebooks nothing is shown.
    """

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, thing: Any) -> None:
        """thing: a picture of PIL, a `Markup`, or anything else that notebooks can show."""
        if self._handle is not None:
            self._handle.update(thing)
        elif is_notebook():
            from IPython.display import display

            self._handle = display(thing, display_id=True)


def shared_place() -> Place:
    """One place for all calls in one run of a cell: what a call shows there replaces what the one before showed."""
    return _place(getattr(_shell(), "execution_count", None))


@lru_cache(1)
def _place(execution: int | None) -> Place:
    return Place()
