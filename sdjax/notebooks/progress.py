"""A progress bar in the cell of a notebook, of HTML alone: without ipywidgets, which Colab has and others have not."""

import time

from sdjax.notebooks.cell import Markup, shared_place

LEAST_SECONDS = 0.1  # between two pictures of a bar


class Bar:
    """Shows how many of `total` steps are done, how long they took, and how long the others will.

    The bars of one cell are in one place, each instead of the one before.
    """

    def __init__(self, total: int):
        self.total, self.done = total, 0
        self._place, self._begun, self._shown = shared_place(), time.monotonic(), float("-inf")
        self._show()

    def advance(self) -> None:
        """One more step is done."""
        self.done += 1
        if self.done == self.total or time.monotonic() - self._shown > LEAST_SECONDS:
            self._show()

    def _show(self) -> None:
        self._shown = time.monotonic()
        self._place.show(drawn(self.done, self.total, self._shown - self._begun))


def drawn(done: int, total: int, seconds: float) -> Markup:
    """A bar, and its numbers as text."""
    parts = [f"{done}/{total} steps", f"{seconds:.1f} s"]
    if 0 < done < total:
        parts.append(f"{seconds / done * (total - done):.1f} s left")
    text = ", ".join(parts)
    bar = f'<progress value="{done}" max="{total}" style="width: 20em; vertical-align: middle"></progress>'
    return Markup(f"{bar} <small>{text}</small>", text)
