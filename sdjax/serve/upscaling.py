"""Pictures made larger by an ESRGAN, in tiles of a few sizes, so that few programs are compiled."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from sdjax import components
from sdjax.models import RRDBNet
from sdjax.runtime import parallel, programs, tiling
from sdjax.runtime.network import Network
from sdjax.serve.catalog import Catalog
from sdjax.serve.loading import fitting, loading

TILE = programs.UPSCALED_TILE
STEP = 64  # pixels: sides of smaller pictures are filled up to multiples of it
PASSES = 3  # through a network at most


class Upscalers:
    """The ESRGANs of a folder, of which the one that was used last stays loaded. One picture at a time is made larger.

    most: pixels that a picture may have when it has come through a network.
    """

    def __init__(self, catalog: Catalog, most: int):
        self.catalog, self._most = catalog, most
        self._turn = asyncio.Lock()
        self._last: tuple[object, Network] = None, None

    async def larger(
        self, upscaler: str | RRDBNet, image: Image.Image, size: tuple[int, int], check: Callable[[], Awaitable[None]]
    ) -> Image.Image:
        """The picture in RGB, through the network until it has this size or more, PASSES times at most.

        upscaler: a name of the catalog, or the network. check: called before each tile; ends it by an exception. Raises
        CannotLoad, ValueError where the picture would have too many pixels.
        """
        async with self._turn:
            await check()
            network = await asyncio.to_thread(self._network, upscaler)
            for _ in range(PASSES):
                if all(own >= wanted for own, wanted in zip(image.size, size, strict=True)):
                    break
                image = await self._passed(network, image, check)
        return image

    def _network(self, upscaler: str | RRDBNet) -> Network:
        if self._last[0] != upscaler:
            self._last = None, None  # so that its memory is free
            self._last = upscaler, Network(self._loaded(upscaler), parallel.data_mesh(jax.local_devices()[:1]))
        return self._last[1]

    def _loaded(self, upscaler: str | RRDBNet) -> RRDBNet:
        if isinstance(upscaler, RRDBNet):
            return upscaler
        path = self.catalog.path(upscaler)
        with fitting(upscaler), loading(upscaler, str(path)):
            return components.load_model("upscaler", path, dtype=None)

    async def _passed(self, network: Network, image: Image.Image, check: Callable[[], Awaitable[None]]) -> Image.Image:
        """The picture, as many times as large as the network makes it."""
        scale = network.module.config.scale
        if (pixels := math.prod(image.size) * scale**2) > self._most:
            raise ValueError(f"image: {pixels:,} pixels, {scale} times as large; {self._most:,} at most")
        plan = Plan.of(image.size, scale)
        pixels = np.pad(np.asarray(image, np.float32) / 127.5 - 1, plan.margins, "edge")
        made = np.zeros((pixels.shape[0] * scale, pixels.shape[1] * scale, 3), np.float32)
        for place in plan.places:
            await check()
            await asyncio.to_thread(_add, network, pixels, made, plan, place)
        made = made[: image.height * scale, : image.width * scale]
        return Image.fromarray(np.uint8(np.rint(made * 127.5 + 127.5).clip(0, 255)))


class Plan(NamedTuple):
    """The tiles of a picture."""

    scale: int
    margins: tuple[tuple[int, int], ...]
    """by which the picture is filled up below and to the right"""
    tile: tuple[int, int]
    """height and width"""
    rows: tuple[np.ndarray, np.ndarray]
    columns: tuple[np.ndarray, np.ndarray]
    """where tiles start, and what their pixels weigh, see `tiling.tiles`"""

    @classmethod
    def of(cls, size: tuple[int, int], scale: int) -> "Plan":
        sides = [max(side, min(TILE, -(-side // STEP) * STEP)) for side in reversed(size)]
        tile = tuple(min(side, TILE) for side in sides)
        margins = (*((0, side - own) for side, own in zip(sides, reversed(size), strict=True)), (0, 0))
        return cls(scale, margins, tile, *(tiling.tiles(*pair, scale) for pair in zip(sides, tile, strict=True)))

    @property
    def places(self) -> list[tuple[int, int]]:
        """(row, column) of each tile."""
        return [(i, j) for i in range(len(self.rows[0])) for j in range(len(self.columns[0]))]


def _add(network: Network, pixels: np.ndarray, made: np.ndarray, plan: Plan, place: tuple[int, int]) -> None:
    """Adds what a tile weighs to `made`."""
    (tops, down), (lefts, across), (height, width) = plan.rows, plan.columns, plan.tile
    (i, j), scale = place, plan.scale
    top, left = tops[i], lefts[j]
    tile = pixels[None, top : top + height, left : left + width]
    mesh, size = parallel.data_mesh(jax.local_devices()[:1]), (height * scale, width * scale)
    found = programs.larger_pictures(mesh, network.graph, network.params(), tile, size)
    weights = down[i][:, None, None] * across[j][:, None]
    made[top * scale : (top + height) * scale, left * scale : (left + width) * scale] += weights * np.asarray(found[0])
