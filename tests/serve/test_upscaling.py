"""Pictures made larger in tiles: of few sizes, which cover a picture and are blended."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sdjax.runtime import programs
from sdjax.serve.upscaling import TILE, Plan, Upscalers


@pytest.mark.parametrize("size", [(1, 1), (64, 65), (255, 700), (257, 256), (1000, 300)])
def test_tiles_cover_a_picture_and_weigh_one(size):
    plan = Plan.of(size, 4)
    width, height = size
    made = np.zeros(((height + plan.margins[0][1]) * 4, (width + plan.margins[1][1]) * 4))
    for i, j in plan.places:
        top, left = plan.rows[0][i] * 4, plan.columns[0][j] * 4
        weights = plan.rows[1][i][:, None] * plan.columns[1][j]
        made[top : top + weights.shape[0], left : left + weights.shape[1]] += weights
    np.testing.assert_allclose(made, 1, atol=1e-5)


def test_few_sizes_of_tiles_are_compiled():
    tiles = {Plan.of((width, height), 4).tile for width in range(1, 600, 7) for height in range(1, 600, 7)}
    assert len(tiles) == (TILE // 64) ** 2


def doubled(mesh, graph, params, tile, size):
    """In place of a network: each pixel four times."""
    return np.repeat(np.repeat(tile, 2, axis=1), 2, axis=2)


def larger(image: Image.Image, check, most: int = 10**9) -> Image.Image:
    network = SimpleNamespace(module=SimpleNamespace(config=SimpleNamespace(scale=2)), graph=None, params=lambda: None)
    upscalers = Upscalers(None, most)
    upscalers._last = "double", network
    return asyncio.run(upscalers.larger("double", image, (image.width + 1, 1), check))


async def go_on() -> None:
    """Ends nothing."""


@pytest.mark.parametrize("size", [(30, 20), (300, 700)])
def test_a_picture_is_put_together(size, monkeypatch):
    monkeypatch.setattr(programs, "larger_pictures", doubled)
    image = Image.effect_noise(size, 90).convert("RGB")
    expected = np.asarray(image.resize((size[0] * 2, size[1] * 2), Image.Resampling.NEAREST), int)
    assert np.abs(np.asarray(larger(image, go_on), int) - expected).max() <= 1


def test_it_ends_between_two_tiles(monkeypatch):
    seen = []

    async def check():
        seen.append(0)
        if len(seen) == 3:
            raise ConnectionError

    monkeypatch.setattr(programs, "larger_pictures", doubled)
    with pytest.raises(ConnectionError):
        larger(Image.new("RGB", (2000, 20)), check)
