"""Several pictures in one: plain grids, and contact sheets with labels."""

import bisect
import unicodedata
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SHEET_CELL = 256  # pixels of the longer side of a picture in a sheet, at most
SHEET_COLUMN = 96  # pixels of the width of a column, at least
SHEET_MARGIN = 8  # pixels
SHEET_FONT = 16  # pixels
SHEET_LINE = 20  # pixels
SHEET_LINES = 3  # of a column's label, at most


def image_grid(images: Sequence[Image.Image], rows: int, cols: int) -> Image.Image:
    """One picture of rows x cols pictures of one size, row by row.

    Raises ValueError unless there are exactly rows * cols pictures, all of one size.
    """
    if len(images) != rows * cols or not images:
        raise ValueError(f"a grid of {rows} rows and {cols} columns needs {rows * cols} pictures, not {len(images)}")
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise ValueError(f"the pictures of a grid must have one size, not {sorted(sizes)}")
    [(width, height)] = sizes
    grid = Image.new("RGB", (cols * width, rows * height))
    for index, image in enumerate(images):
        row, col = divmod(index, cols)
        grid.paste(image, (col * width, row * height))
    return grid


def contact_sheet(
    pictures: Sequence[Image.Image | None], row_labels: Sequence[str], column_labels: Sequence[str], title: str = ""
) -> Image.Image:
    """One picture of len(row_labels) x len(column_labels) pictures, row by row, with a label at each row and column.

    Pictures of more than SHEET_CELL pixels are made smaller; None leaves its place empty. A label that is too long for
    its place is wrapped, then cut. Raises ValueError unless there are exactly as many pictures as places.
    """
    rows, columns = len(row_labels), len(column_labels)
    if len(pictures) != rows * columns or not any(pictures):
        raise ValueError(
            f"a sheet of {rows} rows and {columns} columns needs {rows * columns} pictures, not {len(pictures)}"
        )
    cells = [None if picture is None else _at_most(picture, SHEET_CELL) for picture in pictures]
    width = max(SHEET_COLUMN, *(cell.width for cell in cells if cell))
    height = max(SHEET_LINE, *(cell.height for cell in cells if cell))
    font = ImageFont.load_default(SHEET_FONT)
    beside = max(map(font.getlength, row_labels))
    beside = min(int(np.ceil(beside)), SHEET_CELL)
    left, pitch = beside + (2 if beside else 1) * SHEET_MARGIN, (width + SHEET_MARGIN, height + SHEET_MARGIN)
    sheet_width = left + columns * pitch[0]
    titles = _wrapped(title, font, sheet_width - 2 * SHEET_MARGIN, SHEET_LINES)
    heads = [_wrapped(label, font, width, SHEET_LINES) for label in column_labels]
    head = SHEET_MARGIN + sum(n * SHEET_LINE + SHEET_MARGIN for n in (len(titles), max(map(len, heads))) if n)
    sheet = Image.new("RGB", (sheet_width, head + rows * pitch[1]), "white")
    draw = ImageDraw.Draw(sheet)

    def write(lines: list[str], x: float, y: float, anchor: str) -> None:
        for number, line in enumerate(lines):
            draw.text((x, y + number * SHEET_LINE), line, "black", font, anchor)

    write(titles, SHEET_MARGIN, SHEET_MARGIN, "la")
    for column, lines in enumerate(heads):
        write(lines, left + column * pitch[0] + width / 2, head - SHEET_MARGIN - len(lines) * SHEET_LINE, "ma")
    for row, label in enumerate(row_labels):
        lines = _wrapped(label, font, beside, height // SHEET_LINE)
        write(lines, SHEET_MARGIN, head + row * pitch[1] + (height - len(lines) * SHEET_LINE) / 2, "la")
    for index, cell in enumerate(cells):
        if cell is not None:
            row, column = divmod(index, columns)
            x, y = left + column * pitch[0], head + row * pitch[1]
            sheet.paste(cell, (x + (width - cell.width) // 2, y + (height - cell.height) // 2))
    return sheet


def _at_most(picture: Image.Image, size: int) -> Image.Image:
    scale = min(1, size / max(picture.size))
    shape = tuple(max(1, round(n * scale)) for n in picture.size)
    return picture if scale == 1 else picture.resize(shape, Image.Resampling.LANCZOS)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """The text in lines of at most `width` pixels; what does not fit in `most` lines ends in "…"."""
    plain = "".join(sign for sign in unicodedata.normalize("NFKD", text) if not unicodedata.combining(sign))
    rest, lines = " ".join(plain.split()), []  # Pillow's own font knows no accents
    while rest and len(lines) < most:
        fits = bisect.bisect_right(range(1, len(rest) + 1), width, key=lambda n: font.getlength(rest[:n])) or 1
        space = rest.rfind(" ", 0, fits + 1)
        end = space if fits < len(rest) and space > 0 else fits
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    if rest and lines:
        line = lines[-1]
        while line and font.getlength(f"{line}…") > width:
            line = line[:-1]
        lines[-1] = f"{line.rstrip()}…"
    return lines
