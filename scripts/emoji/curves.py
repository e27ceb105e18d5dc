"""The logs of a run as one picture."""

import csv
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

WIDTH, HEIGHT, MARGIN = 480, 280, 48
AXES = ("step", "seconds")


def draw_curves(logs: Sequence[Path], path: Path) -> None:
    """One plot over the steps for each column of each CSV file, two in a row."""
    plots = [_plot(f"{log.stem}: {name}", *points) for log in logs for name, points in _columns(log).items()]
    rows = -(-len(plots) // 2)
    sheet = Image.new("RGB", (2 * WIDTH, rows * HEIGHT), "white")
    for i, plot in enumerate(plots):
        sheet.paste(plot, (i % 2 * WIDTH, i // 2 * HEIGHT))
    sheet.save(path)


def _columns(log: Path) -> dict[str, tuple[list[float], list[float]]]:
    """name -> (steps, values); of a step that a killed run did twice, the second time"""
    with log.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = {float(row["step"]): row for row in reader}
        names = [name for name in reader.fieldnames or () if name not in AXES]
    return {name: (list(rows), [float(row[name]) for row in rows.values()]) for name in names}


def _plot(title: str, steps: Sequence[float], values: Sequence[float]) -> Image.Image:
    """A line, its extremes written on the axes."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    low, high = min(values), max(values)
    right, bottom = WIDTH - MARGIN // 2, HEIGHT - MARGIN // 2
    draw.rectangle((MARGIN, MARGIN // 2, right, bottom), outline="lightgray")
    draw.text((MARGIN, 6), title, fill="black")
    draw.text((4, MARGIN // 2), f"{high:.4g}", fill="gray")
    draw.text((4, bottom - 12), f"{low:.4g}", fill="gray")
    draw.text((right, bottom + 4), f"{steps[-1]:g}", fill="gray", anchor="ra")

    def at(step: float, value: float) -> tuple[float, float]:
        x = MARGIN + (right - MARGIN) * step / steps[-1]
        return x, bottom - (bottom - MARGIN // 2) * (value - low) / ((high - low) or 1)

    draw.line([at(*point) for point in zip(steps, values, strict=True)], fill="royalblue", width=2)
    return image
