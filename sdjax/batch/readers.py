"""Files of a job: the lines of JSON lines, CSV and YAML, and of a file of prompts; and what is wrong with them."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdjax.elsewhere import hint
from sdjax.kinds import TEXT
from sdjax.request import FIELDS

PROBLEMS_SHOWN = 20
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
    return reader(_content(path))


def read_prompts(path: str | os.PathLike) -> Iterator[tuple[int, str]]:
    """(number of its line, prompt); empty lines and those that start with # are left out."""
    for number, line in enumerate(_content(path).split("\n"), 1):
        prompt = line.strip()
        if prompt and not prompt.startswith("#"):
            yield number, prompt


def _content(path: str | os.PathLike) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8: {error}") from None


def _json_lines(text: str) -> Iterator[Raw]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line, object_pairs_hook=_once)
        except json.JSONDecodeError as error:
            yield number, ValueError(f"not JSON: {error.msg}, at character {error.pos + 1}")
        except ValueError as error:
            yield number, error
        else:
            yield number, values


def _once(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    """A mapping of pairs. Raises ValueError for a key that is there twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return values


def _csv(text: str) -> Iterator[Raw]:
    """A header, then a line for each record; an empty cell is left out."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    number = 1
    try:
        for cells in reader:
            if len(cells) > len(header) > 0:
                yield number, ValueError(f"{len(cells)} cells for {len(header)} columns; quote a cell that has commas")
            elif header and any(map(str.strip, cells)):
                values = zip(header, cells, strict=False)
                yield number, {key: _cell(key, cell) for key, cell in values if cell.strip()}
            elif not header and any(map(str.strip, cells)):
                header = _columns(cells)
            number = reader.line_num + 1  # a record may have several lines
    except (csv.Error, ValueError) as error:
        yield number, ValueError(str(error))


def _columns(cells: Sequence[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if unknown := [name for name in names if name not in FIELDS]:
        raise ValueError("; ".join(f"unknown column {name!r}{hint(name, FIELDS)}" for name in unknown))
    return list(_once([(name, None) for name in names]))


def _cell(key: str, cell: str) -> Any:
    """JSON where it can be read as such, else text; prompts are as they stand, unless they are a list of texts."""
    try:
        value = json.loads(cell)
    except ValueError:
        return cell if key in TEXTS else cell.strip()
    if key not in TEXTS:
        return value
    listed = isinstance(value, list) and all(isinstance(text, str) for text in value)
    return value if listed and value else cell


def _yaml(text: str) -> Iterator[Raw]:
    try:
        import yaml
    except ImportError as error:
        raise ValueError('a job in YAML needs PyYAML: pip install "sdjax[batch]"') from error

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        pass

    def number(loader: Any, node: Any) -> Any:
        """1:30 is a range of seeds, which YAML takes for a number to base 60."""
        if ":" in node.value:
            return node.value
        return loader.construct_yaml_float(node) if node.tag.endswith(":float") else loader.construct_yaml_int(node)

    for kind in ("int", "float"):
        Loader.add_constructor(f"tag:yaml.org,2002:{kind}", number)
    loader = Loader(text)
    try:
        top = loader.get_single_node()
        for node in top.value if isinstance(top, yaml.SequenceNode) else [top] if top else []:
            line = node.start_mark.line + 1
            try:
                if isinstance(node, yaml.MappingNode):
                    _once([(str(key.value), None) for key, _ in node.value])
                yield line, loader.construct_object(node, deep=True)
            except yaml.MarkedYAMLError as error:
                yield line, ValueError(f"not YAML: {error.problem}")
            except ValueError as error:
                yield line, error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        yield mark and mark.line + 1, ValueError(f"not YAML: {getattr(error, 'problem', error)}")
    finally:
        loader.dispose()


READERS: Mapping[str, Callable[[str], Iterator[Raw]]] = {
    ".jsonl": _json_lines,
    ".json": _json_lines,
    ".csv": _csv,
    ".yaml": _yaml,
    ".yml": _yaml,
}


class Problems:
    """Collects what is wrong, and raises it."""

    def __init__(self) -> None:
        self._found: dict[str, None] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, place: int | str | None, problem: str | Exception) -> None:
        """place: the number of a line, or another name; None: the job as a whole. An equal problem counts once."""
        name = f"line {place}" if isinstance(place, int) else place
        self._found[f"{name}: {problem}" if name else str(problem)] = None

    def raise_in(self, name: str) -> None:
        """Raises one ValueError for the first problems, and how many more there are."""
        if self:
            found = list(self._found)
            more = len(found) - PROBLEMS_SHOWN
            shown = found[:PROBLEMS_SHOWN] + ([f"… and {more} more"] if more > 0 else [])
            count = f"{len(found)} problem{'s' * (len(found) > 1)}"
            raise ValueError("\n".join([f"{name}: {count}, nothing was started:", *shown]))


def refusal(attempt: Callable[[], Any]) -> str:
    """The text of the ValueError that it raises, or ""."""
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return ""
