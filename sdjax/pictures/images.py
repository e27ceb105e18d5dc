"""Pictures: float to uint8 and PIL, grids, labelled sheets, and files that say how they were made."""

import bisect
import io
import json
import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFont, PngImagePlugin

from sdjax.files import creating
from sdjax.pictures import web_ui


class Format(NamedTuple):
    """How Pillow writes a kind of picture file."""

    suffix: str
    options: Mapping[str, Any]


FORMATS = {
    "png": Format(".png", {}),
    "webp": Format(".webp", {"quality": 90}),
    "jpeg": Format(".jpg", {"quality": 95}),
}
EXIF_UNICODE = b"UNICODE\0"  # how an EXIF UserComment says its encoding
EXIF_SDJAX = b"sdjax\0"  # whose MakerNote it is

STEM_LENGTH = 48  # characters of the prompt in a file name
SHEET_CELL = 256  # pixels of the longer side of a picture in a sheet, at most
SHEET_COLUMN = 96  # pixels of the width of a column, at least
SHEET_MARGIN = 8  # pixels
SHEET_FONT = 16  # pixels
SHEET_LINE = 20  # pixels
SHEET_LINES = 3  # of a column's label, at most


def denormalize(images: np.ndarray) -> np.ndarray:
    """float32 in 0..1 from a model's -1..1: clip(x / 2 + 1/2, 0, 1)."""
    return (np.asarray(images, np.float32) / 2 + 0.5).clip(0, 1)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """uint8 from float in -1..1, clipped and rounded to the nearest."""
    return (denormalize(images) * 255).round().astype(np.uint8)


def to_pil(images: np.ndarray) -> list[Image.Image]:
    """[B, H, W, 3] float in -1..1 -> B RGB pictures."""
    return [Image.fromarray(image) for image in to_uint8(images)]


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


def encode(picture: Image.Image, settings: Mapping[str, Any], format: str) -> bytes:
    """A picture file of one of FORMATS that carries its settings; the same picture and settings give the same bytes.

    PNG: the text chunks `parameters`, as the Stable Diffusion web UI writes it (see `web_ui.parameters`), and `sdjax`,
    the settings as JSON (see `read_settings`). WebP and JPEG: the EXIF fields UserComment, as the web UI writes it, and
    MakerNote. Raises ValueError for another format, and for settings longer than the 64 KB that JPEG has for EXIF.
    """
    if format not in FORMATS:
        raise ValueError(f"a picture's format must be one of {', '.join(FORMATS)}, not {format!r}")
    parameters, full = web_ui.parameters(settings), json.dumps(settings, ensure_ascii=False, allow_nan=False)
    carried = {"pnginfo": _text_chunks(parameters, full)} if format == "png" else {"exif": _exif(parameters, full)}
    file = io.BytesIO()
    picture.save(file, format, **FORMATS[format].options, **carried)
    return file.getvalue()


def _text_chunks(parameters: str, full: str) -> PngImagePlugin.PngInfo:
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", parameters)  # iTXt where latin-1 does not do
    text.add_text("sdjax", full)
    return text


def _exif(parameters: str, full: str) -> Image.Exif:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif).update(
        {
            ExifTags.Base.UserComment: EXIF_UNICODE + parameters.encode("utf-16-be"),
            ExifTags.Base.MakerNote: EXIF_SDJAX + full.encode(),
        }
    )
    return exif


def save_png(path: str | os.PathLike, image: Image.Image, settings: Mapping[str, Any]) -> Path:
    """Writes a PNG that carries its settings (see `encode`); the file appears complete or not at all.

    Raises FileExistsError when there is such a file, OSError when it cannot be written.
    """
    path = Path(path)
    data = encode(image, settings, "png")
    try:
        with creating(path) as temporary:
            temporary.write_bytes(data)
    except FileExistsError:
        raise FileExistsError(f"{path}: exists already; choose another name, or remove it") from None
    except OSError as error:
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from error
    return path


def read_settings(path: str | os.PathLike) -> dict[str, Any]:
    """The settings that `encode` put in the picture. Raises ValueError when the file is a picture without any."""
    text, _ = _carried(path)
    if text is None:
        raise ValueError(f"{path}: carries no sdjax settings")
    return json.loads(text, object_hook=_without_infinities)


def read_parameters(path: str | os.PathLike) -> str:
    """The text that the web UI, or `encode`, put in the picture. Raises ValueError where there is none."""
    _, text = _carried(path)
    if text is None:
        raise ValueError(f"{path}: carries no settings, neither of sdjax nor of the web UI")
    return text


def _carried(path: str | os.PathLike) -> tuple[str | None, str | None]:
    """The settings as JSON and the web UI's text, where a picture has them."""
    with Image.open(path) as image:
        texts, exif = getattr(image, "text", {}), image.getexif().get_ifd(ExifTags.IFD.Exif)
    note, comment = exif.get(ExifTags.Base.MakerNote, b""), exif.get(ExifTags.Base.UserComment, b"")
    own = note[len(EXIF_SDJAX) :].decode() if note[: len(EXIF_SDJAX)] == EXIF_SDJAX else None
    other = comment[len(EXIF_UNICODE) :].decode("utf-16-be") if comment[: len(EXIF_UNICODE)] == EXIF_UNICODE else None
    return texts.get("sdjax", own), texts.get("parameters", other)


def _without_infinities(read: dict[str, Any]) -> dict[str, Any]:
    """Files that older versions wrote say the infinite defaults of a scheduler, which is not JSON."""
    return {name: value for name, value in read.items() if not (isinstance(value, float) and math.isinf(value))}


def slug(prompt: str) -> str:
    """'A goose, on blue!' -> 'a-goose-on-blue'; 'image' where nothing is left."""
    return re.sub(r"\W+", "-", prompt.lower())[:STEM_LENGTH].strip("-") or "image"
