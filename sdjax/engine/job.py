"""A request on its way through the engine."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sdjax.engine.groups import Group
from sdjax.request import Request

if TYPE_CHECKING:
    from sdjax.pipeline import StableDiffusionPipeline


@dataclass(eq=False, slots=True)
class Job:
    """A request that waits, is under way, or is done."""

    request: Request
    pipe: "StableDiffusionPipeline"
    """the engine's, or a view of it"""
    group: Group
    rows: int
    """of its table: evaluations of the model"""
    owner: Any = None
    """whoever takes turns with other owners"""
    priority: int = 0
    """higher ones first"""
    row: int = 0
    """how many rows the devices have been given"""
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    """of its table and beside it, see `loop.Rows`, while it is under way"""
    begun: float = 0.0
    """when it was given to the devices, in seconds of the clock"""
    future: Future = field(default_factory=Future)
    """of `Sampled`; may be cancelled until it is done: its place is free after the rows under way"""
    previews: list[Future] = field(default_factory=list)
    """of PIL pictures, as the model sees it after the rows under way"""

    @property
    def is_done(self) -> bool:
        """Whether the devices have been given all rows."""
        return self.row == self.rows

    def preview(self) -> Future:
        """A future of a PIL picture as the model sees it by then; cancelled where the job ends before."""
        preview = Future()
        self.previews.append(preview)
        if self.future.done():
            preview.cancel()
        return preview

    def show(self, picture: Image.Image) -> None:
        """Gives the previews that are asked for."""
        asked, self.previews = self.previews, []
        for preview in asked:
            if preview.set_running_or_notify_cancel():
                preview.set_result(picture)

    def end(self) -> None:
        """Forgets what it holds."""
        self.columns = {}
        asked, self.previews = self.previews, []
        for preview in asked:
            preview.cancel()
