"""Previews of a call's pictures inside the cell that makes them."""

import math
from collections.abc import Callable

from PIL import Image

from sdjax.notebooks.cell import Place
from sdjax.pictures.grids import contact_sheet


class Previews:
    """The callback of a call that shows its pictures as the model sees them, every so many steps, in one place.

    Outside of notebooks it shows nothing. May be given to several calls.
    """

    def __init__(self, every: int = 1):
        if every < 1:
            raise ValueError(f"every: 1 step or more, not {every}")
        self.every = every
        self.images: dict[int, Image.Image] = {}
        """of the last call: by step, its first picture then"""
        self._place = Place()

    def __call__(self, step: int, total: int, preview: Callable[[], list[Image.Image]]) -> None:
        if step == 1:
            self.images, self._place = {}, Place()
        if step % self.every == 0 or step == total:
            images = preview()
            self.images[step] = images[0]
            columns = math.isqrt(len(images) - 1) + 1
            images += [None] * (-len(images) % columns)
            rows = len(images) // columns
            self._place.show(images[0] if rows * columns == 1 else contact_sheet(images, [""] * rows, [""] * columns))

    @property
    def sheet(self) -> Image.Image:
        """All of `images` in a row, under the numbers of their steps."""
        return contact_sheet(list(self.images.values()), [""], [f"step {step}" for step in self.images])
