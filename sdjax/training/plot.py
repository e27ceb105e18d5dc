"""The loss of a run as a picture."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 960, 480
LEFT, RIGHT, TOP, BOTTOM = 72, 24, 40, 48  # pixels of margins
TICKS = 6
GREY, LINE, MEAN = (225, 225, 225), (170, 195, 225), (20, 80, 160)
SMOOTHED = 20  # the mean curve is over this part of the run
FONT = 14  # pixels


def curve(steps: Sequence[int], losses: Sequence[float], title: str) -> Image.Image:
    """Each loss in pale, its moving average over a twentieth of the run in dark. Axes begin at 0."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(FONT)
    last, most = max(steps), float(np.quantile(losses, 0.99)) * 1.1 or 1.0

    def place(step: float, loss: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        return x, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(loss, most) / most

    for value in ticks(most):
        x, y = place(0, value)
        draw.line([(x, y), (WIDTH - RIGHT, y)], GREY)
        draw.text((x - 8, y), f"{value:g}", "black", font, "rm")
    for value in ticks(last):
        x, y = place(value, 0)
        draw.line([(x, y), (x, TOP)], GREY)
        draw.text((x, y + 8), f"{value:g}", "black", font, "ma")
    draw.line([place(*point) for point in zip(steps, losses, strict=True)], LINE)
    draw.line([place(*point) for point in zip(steps, smoothed(losses), strict=True)], MEAN, 2)
    draw.text((LEFT, TOP / 2), title, "black", font, "lm")
    draw.text((WIDTH - RIGHT, HEIGHT - 8), "step", "black", font, "rs")
    return image


def smoothed(losses: Sequence[float]) -> np.ndarray:
    """The mean of each and those before it, over a part of the run."""
    window = max(1, len(losses) // SMOOTHED)
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def ticks(most: float) -> list[float]:
    """Round values from 0 to at most `most`: steps of 1, 2 or 5 times a power of ten."""
    rough = most / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [step * number for number in range(int(most / step + 1e-9) + 1)]
