"""Files of a job: the lines of JSON lines, CSV and YAML, and of a file of prompts; and what is wrong with them."""

import csv
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdjax.batch import yaml_lines
from sdjax.fields import brief, whole
from sdjax.request import FIELDS
from sdjax.request.elsewhere import hint
from sdjax.request.kinds import TEXT

LONGEST_LINE = 16 << 20  # bytes
PROBLEMS_SHOWN = 20
MOST_PROBLEMS = 1000  # with so many the rest of a job is not read
TEXTS = tuple(name for name, spec in FIELDS.items() if spec.kind is TEXT)

Raw = tuple[int | None, Any]
"""A line's number, and its content, which should be a mapping, or the error for which it cannot be read"""


def read_lines(path: Path) -> Iterator[Raw]:
    """The lines of a job file.

    Raises ValueError for a file that is no job as a whole, and for YAML without PyYAML; OSError for one that cannot be
    read.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: a job is a file of {', '.join(READERS)}")
    return reader(path)


def read_prompts(path: str | os.PathLike) -> Iterator[tuple[int, str]]:
    """(number of its line, prompt); empty lines and those that start with # are left out."""
    for number, line in _lines(path):
        prompt = line.strip()
        if prompt and not prompt.startswith("#"):
            yield number, prompt


def _lines(path: str | os.PathLike) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines of a file. Raises ValueError for one that is no text in UTF-8, or has no end."""
    with open(path, "rb") as file:
        for number in itertools.count(1):
            line = file.readline(LONGEST_LINE + 1)
            if not line:
                return
            if len(line) > LONGEST_LINE:
                raise ValueError(f"{path}: line {number} has more than {LONGEST_LINE >> 20} MiB")
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: line {number}: not text in UTF-8: {error}") from None


def _json_lines(path: Path) -> Iterator[Raw]:
    for number, line in _lines(path):
        if line.strip():
            yield number, _attempted(_json, line)


def _attempted(read: Callable[[Any], Any], raw: Any) -> Any:
    """What it reads, or the ValueError for which it cannot."""
    try:
        return read(raw)
    except ValueError as error:
        return error


def _json(text: str) -> Any:
    try:
        return _decoder.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}, at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("not a job: nested too deeply") from None


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of pairs. Raises ValueError for a key that is there twice."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{brief(key)} is given twice")
        values[key] = value
    return values


_decoder = json.JSONDecoder(object_pairs_hook=_once, parse_int=whole)


def _csv(path: Path) -> Iterator[Raw]:
    """A header, then a line for each record; an empty cell is left out."""
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    header: list[str] = []
    number = 1
    try:
        for cells in reader:
            if len(cells) > len(header) > 0:
                yield number, ValueError(f"{len(cells)} cells for {len(header)} columns; quote a cell that has commas")
            elif header and any(map(str.strip, cells)):
                yield number, _attempted(_record, zip(header, cells, strict=False))
            elif not header and any(map(str.strip, cells)):
                columns = _attempted(_columns, cells)
                if isinstance(columns, ValueError):
                    yield number, columns
                    return
                header = columns
            number = reader.line_num + 1  # a record may have several lines
    except csv.Error as error:
        yield number, ValueError(str(error))


def _columns(cells: Sequence[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if unknown := [name for name in names if name not in FIELDS]:
        shown = "; ".join(f"unknown column {brief(name)}{hint(name, FIELDS)}" for name in unknown[:PROBLEMS_SHOWN])
        raise ValueError(shown + f"; … and {len(unknown) - PROBLEMS_SHOWN} more" * (len(unknown) > PROBLEMS_SHOWN))
    return list(_once((name, None) for name in names))


def _record(cells: Iterable[tuple[str, str]]) -> dict[str, Any]:
    return {key: _cell(key, cell) for key, cell in cells if cell.strip()}


def _cell(key: str, cell: str) -> Any:
    """JSON where it can be read as such, else text; prompts are as they stand, unless they are a list of texts."""
    try:
        value = _json(cell)
    except ValueError:
        return cell if key in TEXTS else cell.strip()
    if key not in TEXTS:
        return value
    listed = isinstance(value, list) and all(isinstance(text, str) for text in value)
    return value if listed and value else cell


READERS: Mapping[str, Callable[[Path], Iterator[Raw]]] = {
    ".jsonl": _json_lines,
    ".json": _json_lines,
    ".csv": _csv,
    ".yaml": yaml_lines.read,
    ".yml": yaml_lines.read,
}


class Problems:
    """Collects what is wrong with a job, and raises it: when that is asked for, or there is very much."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._found: dict[str, None] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, place: int | str | None, problem: str | Exception) -> None:
        """place: the number of a line, or another name; None: the job as a whole. An equal problem counts once."""
        name = f"line {place}" if isinstance(place, int) else place
        self._found[f"{name}: {problem}" if name else str(problem)] = None
        if len(self._found) == MOST_PROBLEMS:
            self.raise_any()

    def raise_any(self) -> None:
        """Raises one ValueError for the first problems, and how many more there are, if there are any."""
        if self:
            found = list(self._found)
            more = len(found) - PROBLEMS_SHOWN
            shown = found[:PROBLEMS_SHOWN] + ([f"… and {more} more"] if more > 0 else [])
            count = f"{len(found)} problem{'s' * (len(found) > 1)}{' or more' * (len(found) == MOST_PROBLEMS)}"
            raise ValueError("\n".join([f"{self.name}: {count}, nothing was started:", *shown]))


def refusal(attempt: Callable[[], Any]) -> str:
    """The text of the ValueError that it raises, or ""."""
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return ""
