"""Pictures of many settings, in as many calls as they take, and as one labelled picture."""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from sdjax import inputs
from sdjax.pictures.grids import contact_sheet

if TYPE_CHECKING:
    from sdjax.pipeline import StableDiffusionPipeline

MOST = 4  # pictures of a device at once
PIXELS = 2**20  # of them together, at most: SDXL's 1024x1024 with 16 GB


def at_once(pipe: "StableDiffusionPipeline") -> int:
    """How many pictures of the model's own size a call has here: few enough for devices of 16 GB."""
    height, width = inputs.picture_size(pipe)
    return pipe.mesh.size * max(1, min(MOST, PIXELS // (height * width)))


def draw(pipe: "StableDiffusionPipeline", **arguments: Any) -> list[Image.Image]:
    """The pictures of a call with these arguments, in calls of `at_once` pictures.

    Lists have a value for each picture, and are equally long; there is one at least.
    """
    lists = {name: value for name, value in arguments.items() if isinstance(value, list | tuple | range)}
    count, size = max(map(len, lists.values())), at_once(pipe)
    images = []
    for start in range(0, count, size):
        call = {name: value[start : start + size] for name, value in lists.items()}
        images += pipe(**{**arguments, **call}).images
    return images


def sweep(
    pipe: "StableDiffusionPipeline",
    columns: Mapping[str, Sequence[Any]],
    rows: Mapping[str, Sequence[Any]] | None = None,
    **shared: Any,
) -> Image.Image:
    """One picture of a picture for each row and column, labelled.

    columns, rows: an argument of a call and its values, such as {"scheduler": ["euler", "unipc"]}. shared: arguments
    of a call, one value for all pictures; not looked at where a row or column has another.
    """
    axes = [*(rows or {"": [""]}).items(), *columns.items()]
    if len(axes) != 2:
        raise ValueError(f"rows and columns: one argument each, not {', '.join(name for name, _ in axes)}")
    (down, vertical), (across, horizontal) = axes
    places = list(itertools.product(vertical, horizontal))
    lists = {name: [value] * len(places) for name, value in shared.items()}
    lists |= {down: [place[0] for place in places], across: [place[1] for place in places]}
    lists.pop("", None)
    return contact_sheet(draw(pipe, **lists), _labels(down, vertical), _labels(across, horizontal))


def _labels(name: str, values: Sequence[Any]) -> list[str]:
    """Texts stand for themselves; numbers, and no text, have the argument's name before them."""
    name = name.replace("_", " ")
    return [value or f"no {name}" * bool(name) if isinstance(value, str) else f"{name} {value}" for value in values]
