"""Contact sheets of a job's sweeps: X from left to right, Y from top to bottom, a sheet for each Z."""

import io
import itertools
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from sdjax.batch import manifest
from sdjax.batch.job import Items, Line
from sdjax.batch.output import Output
from sdjax.pictures.grids import contact_sheet
from sdjax.pictures.metadata import encode
from sdjax.request import FIELDS, kinds

FOLDER = "sheets"
MOST_AXES = 3
MOST_PICTURES = 2500


def check(items: Items) -> None:
    """Raises ValueError for a line that sweeps more than three keys, or more pictures than a sheet holds."""
    for line in items.lines:
        place = "" if line.number is None else f", line {line.number}"
        if len(line.swept) > MOST_AXES:
            raise ValueError(f"{items.name}{place}: a grid has X, Y and Z, but this sweeps {', '.join(line.swept)}")
        *_, rows, columns = ((), (), *line.swept.values())
        if (count := max(1, len(rows)) * max(1, len(columns))) > MOST_PICTURES:
            raise ValueError(f"{items.name}{place}: {count:,} pictures, of at most {MOST_PICTURES:,} on a sheet")


def write(items: Items, output: Output) -> list[str]:
    """Makes the sheets of all lines that sweep anything, and returns their paths or URLs."""
    table = manifest.read(output.target.fs, output.target.root).select(["index", "seed", "file"])
    files = {row["index"]: row for row in table.to_pylist()}
    written, first = [], 0
    for number, line in enumerate(items.lines, 1):
        for part, (title, rows, columns, indices) in enumerate(_sheets(line, first), 1):
            pictures = [_picture(output, files[index]) for index in indices]
            sheet = contact_sheet(pictures, rows, columns, title)
            name = f"{FOLDER}/{line.number or number:06}-{part:03}.png"
            settings = {"prompt": title, "width": sheet.width, "height": sheet.height}
            output.target.write(name, encode(sheet, settings, "png"))
            written.append(output.target.shown(name))
        first += line.count
    return written


def _sheets(line: Line, first: int) -> list[tuple[str, list[str], list[str], range]]:
    """(title, labels of rows, labels of columns, places in the job) of each sheet of a line."""
    if not line.swept:
        return []
    labels = [[_label(key, value) for value in values] for key, values in line.swept.items()]
    sheets, rows, columns = [[""]] * (3 - len(labels)) + labels
    size = len(rows) * len(columns)
    starts = itertools.count(first, size)
    return [(title, rows, columns, range(start, start + size)) for title, start in zip(sheets, starts, strict=False)]


def _label(key: str, value: Any) -> str:
    spec = FIELDS[key]
    text = spec.json(value)
    if spec.kind is kinds.PICTURE:
        text = str(value or "none")
    if spec.kind is kinds.PICTURES:
        text = ", ".join(map(str, value or ("none",)))
    if key == "loras":
        text = ", ".join(f"{path.rpartition('/')[2]}:{weight:g}" for path, weight in value) or "no LoRA"
    return f"{spec.label} {text}".strip()


def _picture(output: Output, row: Mapping[str, Any]) -> Image.Image:
    data = output.target.read(row["file"])
    if row["file"].endswith(".tar"):
        data = _member(data, f"{row['index']:06}-{row['seed']}")
    with Image.open(io.BytesIO(data)) as picture:
        return picture.convert("RGB")


def _member(shard: bytes, key: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(shard)) as tar:
        members: Sequence[tarfile.TarInfo] = tar.getmembers()
        names = (member.name for member in members)
        name = next(name for name in names if name.startswith(f"{key}.") and not name.endswith((".json", ".txt")))
        return tar.extractfile(name).read()
