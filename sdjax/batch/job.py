"""What a batch makes: a job file, or options alone, expanded into the items of a sweep, one for each picture.

A job is a file of JSON lines (.jsonl, .json), CSV (.csv, a header first) or YAML (.yaml, .yml: a list of mappings, or
one). A line says what the pipeline's arguments of the same names say, and `loras`:

    {"prompt": "a goose", "seed": "0:4", "guidance_scale": [3, 5], "loras": {"style.safetensors": 0.8}}

Every list multiplies: a line stands for all combinations of its values, the last key counting fastest. A seed may be a
text of seeds and ranges, "1,5,8:11" (11 not included). `loras` is a mapping from paths or Hub ids to weights, or a text
such as "style.safetensors:0.8"; a list of those, null for none, is a sweep as any other. Paths are relative to the
working directory. In CSV a cell is JSON where it can be read as such, else text; an empty one says nothing; prompts are
text as they stand, unless they are a JSON list of texts.
"""

import csv
import difflib
import hashlib
import io
import itertools
import json
import math
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdjax.arguments import MAX_SEED
from sdjax.options import parse_lora

if TYPE_CHECKING:
    from sdjax.pipeline import StableDiffusionPipeline

MAX_ITEMS = 10_000_000
PROBLEMS_SHOWN = 20
ID_BYTES = 10
TEXTS = ("prompt", "negative_prompt")
OTHERWISE_CALLED = {
    "sampler": "scheduler",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "size": "width and height",
}
"""Names of the command's options and of other tools for these keys"""

_encode = json.JSONEncoder(separators=(",", ":")).encode

Axes = Mapping[str, Sequence[Any]]
"""The values of each key that is given, the key that counts fastest last"""
Raw = tuple[int | None, Any]
"""A line's number, and what it says, which should be a mapping, or the error for which it cannot be read"""


@dataclass(frozen=True, slots=True)
class Item:
    """What makes one picture, in the pipeline's words; what is None is the model's own."""

    prompt: str
    negative_prompt: str | None = None
    seed: int = 0
    scheduler: str | None = None
    num_inference_steps: int = 50
    guidance_scale: float | None = None
    width: int | None = None
    height: int | None = None
    clip_skip: int | None = None
    noise: str = "jax"
    loras: tuple[tuple[str, float], ...] = ()
    """(path or Hub id, weight), sorted"""

    @property
    def is_guided(self) -> bool:
        """Whether the negative prompt is read. Every model's own guidance_scale is more than 1."""
        return self.guidance_scale is None or self.guidance_scale > 1

    def settings(self) -> dict[str, Any]:
        """All fields by name, as JSON has them; the LoRAs as {path: weight}."""
        return {name: getattr(self, name) for name in FIELDS} | {"loras": dict(self.loras)}

    def id(self, fingerprint: str) -> str:
        """20 hexadecimal digits of BLAKE2b of the settings, as JSON, and of what tells the model from others."""
        content = _encode([self.settings(), fingerprint])
        return hashlib.blake2b(content.encode(), digest_size=ID_BYTES).hexdigest()


FIELDS = tuple(field.name for field in fields(Item))


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a job: the product of its axes, in their order, the last one fastest."""

    number: int | None
    """in the file, from 1; None: the options alone"""
    axes: Axes

    def __len__(self) -> int:
        return math.prod(map(len, self.axes.values()))

    def __iter__(self) -> Iterator[Item]:
        for values in itertools.product(*self.axes.values()):
            yield Item(**dict(zip(self.axes, values, strict=True)))

    def __getitem__(self, index: int) -> Item:
        chosen = {}
        for name, values in reversed(self.axes.items()):
            index, place = divmod(index, len(values))
            chosen[name] = values[place]
        return Item(**chosen)

    @property
    def swept(self) -> dict[str, Sequence[Any]]:
        """The axes of more than one value: Z, Y and X of a grid, in this order."""
        return {name: values for name, values in self.axes.items() if len(values) > 1}


class Items(Sequence[Item]):
    """The items of all lines in order. They are made when asked for, so that a million take no memory."""

    def __init__(self, name: str, lines: Sequence[Line]):
        self.name, self.lines = name, lines
        self._ends = list(itertools.accumulate(map(len, lines)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Item]:
        return itertools.chain.from_iterable(self.lines)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # raises IndexError
        line = bisect_right(self._ends, index)
        return self.lines[line][index - (self._ends[line - 1] if line else 0)]


def read(
    source: str | os.PathLike | Iterable[Mapping[str, Any]] | None = None,
    flags: Mapping[str, Any] | None = None,
    *,
    prompts: str | os.PathLike | None = None,
) -> Items:
    """The items of a job, checked as far as that needs no model.

    source: a job file, or its lines as mappings; None: flags alone are the job.
    flags: values, as a line has them, for the keys that a line does not have; they count faster than the line's.
    prompts: in place of source, a file with a prompt on each line, swept slowest; empty lines and those that start
    with # are left out.
    Raises ValueError that lists the problems of all lines, OSError for a file that cannot be read, ImportError for YAML
    without PyYAML.
    """
    if source is not None and prompts is not None:
        raise ValueError(f"give either a job or a file of prompts, not both {source} and {prompts}")
    problems = Problems()
    flags = flags or {}
    if prompts is not None and "prompt" in flags:
        raise ValueError(f"give either prompts or a file of them, not both {flags['prompt']!r} and {prompts}")
    defaults = _axes(flags, "options", problems)
    lines = []
    if prompts is not None:
        name, raw = str(prompts), ()
        lines = [Line(None, {"prompt": _prompts(prompts, problems)} | defaults)]
    elif source is None:
        name, raw = "options", [(None, {})]
    elif isinstance(source, str | os.PathLike):
        name, raw = str(source), _lines(Path(source))
    else:
        name, raw = "job", enumerate(source, 1)
    for number, said in raw:
        place = _place(number)
        if not isinstance(said, Mapping):
            wrong = said if isinstance(said, Exception) else f"not a mapping of keys to values: {str(said)[:40]}"
            problems.add(place, wrong)
            continue
        own = _axes(said, place, problems)
        if "prompt" not in said and "prompt" not in flags:
            problems.add(place, "has no prompt")
        lines.append(Line(number, own | {key: values for key, values in defaults.items() if key not in said}))
    count = sum(math.prod(map(len, line.axes.values())) for line in lines)
    if count > MAX_ITEMS:
        problems.add("", f"{count:,} pictures, more than {MAX_ITEMS:,}; make it several jobs")
    elif not count and not problems:
        problems.add("", "names no picture")
    problems.raise_in(name)
    _check_repeats(name, lines)
    return Items(name, lines)


def check(items: Items, pipe: "StableDiffusionPipeline") -> Items:
    """The items with what they left to the model filled in, so that equal pictures have equal ids, checked against it.

    The scheduler stays None where it is the model's own. Raises ValueError that lists the problems of all lines: sizes
    that the VAE cannot have, steps that the sampler cannot take, layers that are not there.
    """
    from sdjax import arguments
    from sdjax.samplers import from_config

    height, width = pipe._size(None, None, None)
    own = {"guidance_scale": pipe.guidance_scale, "width": width, "height": height, "clip_skip": 0}
    if not pipe.config.get("force_zeros_for_empty_prompt"):  # else no negative prompt is not an empty one
        own["negative_prompt"] = ""

    @cache
    def steps(scheduler: str | None, num_inference_steps: int) -> str:
        return _reason(lambda: from_config(pipe.scheduler.config, scheduler).table(num_inference_steps))

    @cache
    def size(height: int, width: int) -> str:
        return _reason(lambda: arguments.latent_size(height, width, pipe.vae.config.factor))

    @cache
    def layers(clip_skip: int) -> str:
        return _reason(lambda: pipe._reading(clip_skip))

    checks = ((steps, "scheduler", "num_inference_steps"), (size, "height", "width"), (layers, "clip_skip"))
    defaults = Item("")
    problems, lines = Problems(), []
    for line in items.lines:
        filled = {key: line.axes.get(key, (getattr(defaults, key),)) for key in (*line.axes, *own)}
        for key, value in own.items():
            if None in filled[key]:
                filled[key] = tuple(value if known is None else known for known in filled[key])
        for find, *keys in checks:
            for values in itertools.product(*(filled.get(key, (getattr(defaults, key),)) for key in keys)):
                if reason := find(*values):
                    problems.add(_place(line.number), reason)
        lines.append(Line(line.number, filled))
    problems.raise_in(items.name)
    _check_repeats(items.name, lines)
    return Items(items.name, lines)


def lora_digests(items: Items) -> dict[str, str]:
    """The SHA-256 of the content of each LoRA that the items name."""
    names = {path for line in items.lines for loras in line.axes.get("loras", ()) for path, _ in loras}
    digests = {}
    for name in sorted(names):
        with _lora_file(name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


class Problems:
    """What is wrong with a job, all of it."""

    def __init__(self) -> None:
        self._found: dict[str, None] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, place: str, problem: str | Exception) -> None:
        self._found[f"{place}: {problem}" if place else str(problem)] = None

    def raise_in(self, name: str) -> None:
        """Raises one ValueError for the first problems, and how many more there are."""
        if self:
            found = list(self._found)
            more = len(found) - PROBLEMS_SHOWN
            shown = found[:PROBLEMS_SHOWN] + ([f"… and {more} more"] if more > 0 else [])
            count = f"{len(found)} problem{'s' * (len(found) > 1)}"
            raise ValueError("\n".join([f"{name}: {count}, nothing was started:", *shown]))


def _place(number: int | None) -> str:
    return "" if number is None else f"line {number}"


def _reason(attempt: Callable[[], Any]) -> str:
    """Why it raises ValueError, or ""."""
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return ""


def _check_repeats(name: str, lines: Sequence[Line]) -> None:
    """Raises ValueError that lists the lines with an item that was there before."""
    problems = Problems()
    for line in lines:
        for key, values in line.axes.items():
            if not isinstance(values, range) and len(set(values)) < len(values):
                twice, _ = Counter(values).most_common(1)[0]
                problems.add(_place(line.number), f"{key} has {twice!r} twice")
    problems.raise_in(name)
    uses = Counter(prompt for line in lines for prompt in line.axes["prompt"])
    first: dict[Item, int | None] = {}
    for line in lines:
        if max(uses[prompt] for prompt in line.axes["prompt"]) == 1:
            continue
        for item in line:
            if uses[item.prompt] > 1 and first.setdefault(item, line.number) != line.number:
                problems.add(_place(line.number), f"makes the picture of line {first[item]} again: {item}")
                break
    problems.raise_in(name)


def _axes(said: Mapping[str, Any], place: str, problems: Problems) -> dict[str, Sequence[Any]]:
    """The values of each key, checked; what is wrong goes to problems."""
    axes = {}
    for key, value in said.items():
        try:
            axes[key] = _axis(key, value)
        except ValueError as error:
            problems.add(place, error)
    return axes


def _hint(key: Any) -> str:
    close = difflib.get_close_matches(str(key), FIELDS, n=1)
    close = [OTHERWISE_CALLED[key]] if key in OTHERWISE_CALLED else close
    return f"; did you mean {close[0]}?" if close else f"; the keys are {', '.join(FIELDS)}"


def _axis(key: str, value: Any) -> Sequence[Any]:
    """The values of a key, of which there may be one or a list."""
    if key not in AXES:
        raise ValueError(f"unknown key {key!r}{_hint(key)}")
    values = list(value) if isinstance(value, list | tuple | range) else [value]
    if not values:
        raise ValueError(f"{key} is an empty list")
    return AXES[key](key, values)


def _seeds(key: str, values: Sequence[Any]) -> Sequence[int]:
    """[7, '8:11'] -> (7, 8, 9, 10); one range stays a range."""
    ranges = [seeds for value in values for seeds in _seed_ranges(key, value)]
    if sum(seeds.stop - seeds.start for seeds in ranges) > MAX_ITEMS:  # too long for len
        raise ValueError(f"{key}: more than {MAX_ITEMS:,} seeds")
    return ranges[0] if len(ranges) == 1 else tuple(itertools.chain.from_iterable(ranges))


def _seed_ranges(key: str, value: Any) -> list[range]:
    """7 -> [range(7, 8)]; '1,8:11' -> [range(1, 2), range(8, 11)]."""
    if not isinstance(value, str):
        seed = _whole(key, value, 0, MAX_SEED)
        return [range(seed, seed + 1)]
    ranges = []
    for part in value.split(","):
        match = re.fullmatch(r"(\d+)(?::(\d+))?", part.strip(), re.ASCII)
        if not match:
            raise ValueError(f"{key}: {part!r} is neither a seed (7) nor a range (0:16)")
        start = int(match[1])
        stop = start + 1 if match[2] is None else int(match[2])
        if not start < stop <= MAX_SEED + 1:
            raise ValueError(f"{key}: {part!r} names no seeds from 0 to 2^64 - 1")
        ranges.append(range(start, stop))
    return ranges


def _whole(key: str, value: Any, least: int, most: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        limits = f"{least} or more" if most is None else f"from {least} to {most}"
        raise ValueError(f"{key} must be a whole number, {limits}, not {value!r}")
    return value


def _finite(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key} must be a finite number, not {value!r}")
    return float(value)


def _text(key: str, value: Any) -> str:
    from sdjax import prompts

    if not isinstance(value, str):
        raise ValueError(f"{key} must be text, not {value!r}")
    try:
        prompts.parse(value)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    return value


def _sampler(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} must be the name of a sampler, not {value!r}")
    _check_sampler(value)
    return value


@cache
def _check_sampler(name: str) -> None:
    from sdjax.samplers import from_config

    from_config(name)


def _noise(key: str, value: Any) -> str:
    from sdjax import arguments, noise

    arguments.one_of(key, value, ("jax", *noise.KINDS))
    return value


def _loras(key: str, value: Any) -> tuple[tuple[str, float], ...]:
    """{'style.safetensors': 0.8}, 'style.safetensors:0.8' or None -> ((path, weight), …), of files that are there."""
    value = dict([parse_lora(value)]) if isinstance(value, str) else value
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{key} must be {{path: weight}} or path:weight, not {value!r}")
    pairs = sorted(
        (str(path), _finite(f"{key}: the weight of {path}", weight)) for path, weight in (value or {}).items()
    )
    for path, _ in pairs:
        try:
            _lora_file(path)
        except OSError as error:
            raise ValueError(f"{key}: {error}") from None
    return tuple(pairs)


@cache
def _lora_file(path: str) -> Path:
    from sdjax.checkpoints import hub, lora

    return hub.resolve_file(path, lora.FILE_NAMES)


def _each(check: Callable[[str, Any], Any], *, optional: bool = False) -> Callable[[str, Sequence[Any]], Sequence[Any]]:
    """Checks all values of a key; optional: None is one of them."""
    return lambda key, values: tuple(None if optional and value is None else check(key, value) for value in values)


AXES: Mapping[str, Callable[[str, Sequence[Any]], Sequence[Any]]] = {
    "prompt": _each(_text),
    "negative_prompt": _each(_text, optional=True),
    "seed": _seeds,
    "scheduler": _each(_sampler, optional=True),
    "num_inference_steps": _each(partial(_whole, least=1)),
    "guidance_scale": _each(_finite, optional=True),
    "width": _each(partial(_whole, least=1), optional=True),
    "height": _each(partial(_whole, least=1), optional=True),
    "clip_skip": _each(partial(_whole, least=0), optional=True),
    "noise": _each(_noise),
    "loras": _each(_loras),
}
"""From what a line says of a key, as a list, to its values as `Item` has them; ValueError names the key"""


def _prompts(path: str | os.PathLike, problems: Problems) -> tuple[str, ...]:
    """The prompts of a file that has one on each line."""
    first: dict[str, int] = {}
    for number, line in enumerate(_content(path).split("\n"), 1):
        prompt = line.strip()
        if not prompt or prompt.startswith("#"):
            continue
        if prompt in first:
            problems.add(f"line {number}", f"the prompt of line {first[prompt]} again: {prompt!r}")
            continue
        first[prompt] = number
        if reason := _reason(lambda prompt=prompt: _text("prompt", prompt)):
            problems.add(f"line {number}", reason)
    return tuple(first)


def _lines(path: Path) -> Iterator[Raw]:
    """What the lines of a job file say. Raises ValueError for a file that is no job as a whole."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: a job is a file of {', '.join(READERS)}")
    return reader(_content(path))


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
            said = json.loads(line, object_pairs_hook=_once)
        except json.JSONDecodeError as error:
            yield number, ValueError(f"not JSON: {error.msg}, at character {error.pos + 1}")
        except ValueError as error:
            yield number, error
        else:
            yield number, said


def _once(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    """A mapping of pairs. Raises ValueError for a key that is there twice."""
    said = dict(pairs)
    if len(said) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return said


def _csv(text: str) -> Iterator[Raw]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    number = 1
    try:
        for cells in reader:
            if len(cells) > len(header) > 0:
                yield number, ValueError(f"{len(cells)} cells for {len(header)} columns; quote a cell that has commas")
            elif header and any(map(str.strip, cells)):
                said = zip(header, cells, strict=False)
                yield number, {key: _cell(key, cell) for key, cell in said if cell.strip()}
            elif not header and any(map(str.strip, cells)):
                header = _columns(cells)
            number = reader.line_num + 1  # a record may have several lines
    except (csv.Error, ValueError) as error:
        yield number, ValueError(str(error))


def _columns(cells: Sequence[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if unknown := [name for name in names if name not in AXES]:
        raise ValueError("; ".join(f"unknown column {name!r}{_hint(name)}" for name in unknown))
    return list(_once([(name, None) for name in names]))


def _cell(key: str, cell: str) -> Any:
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
        raise ImportError('a job in YAML needs PyYAML: pip install "sdjax[batch]"') from error

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
