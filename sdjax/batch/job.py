"""What a batch makes: a job file, or options alone, expanded into the items of a sweep, one for each picture.

A job is a file of JSON lines (.jsonl, .json), CSV (.csv, a header first) or YAML (.yaml, .yml: a list of mappings, or
one). A line has values for the pipeline's arguments of the same names, and `loras`:

    {"prompt": "a goose", "seed": "0:4", "guidance_scale": [3, 5], "loras": {"style.safetensors": 0.8}}

Every list multiplies: a line stands for all combinations of its values, the last key counting fastest. A seed may be a
text of seeds and ranges, "1,5,8:11" (11 not included). `loras` is a mapping from paths or Hub ids to weights, or a text
such as "style.safetensors:0.8"; a list of those, null for none, is a sweep as any other. Paths are relative to the
working directory. `guidance_interval` is a text of two noise levels, "0.3:5"; a list of numbers is one value of
`timesteps` or `sigmas`, a list of lists a sweep. `image`, `mask_image` and `control_image` are paths of pictures; lines
with pictures have their size where they give none. With several ControlNets a value for each of them is a list in the
list: [["edges.png", "depth.png"]]. So it is with the `ip_adapter_image` of several IP-Adapters; several pictures of one
of them are another list in that.

In CSV a cell is JSON where it can be read as such, else text; an empty one is left out; prompts are text as they
stand, unless they are a JSON list of texts.
"""

import hashlib
import itertools
import math
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdjax.batch.readers import Problems, read_lines, read_prompts, refusal
from sdjax.fields import brief
from sdjax.request import FIELDS, Request, spec
from sdjax.request.kinds import TEXT
from sdjax.request.values import MAX_PICTURES, PLAIN, is_listed, lora_file

if TYPE_CHECKING:
    from sdjax.pipeline import StableDiffusionPipeline

Axes = Mapping[str, Sequence[Any]]
"""The values of each key that is given, the key that counts fastest last"""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a job: the product of its axes, in their order, the last one fastest."""

    number: int | None
    """in the file, from 1; None: the options alone"""
    axes: Axes

    @property
    def count(self) -> int:
        """How many items it has, which may be more than `len` can say."""
        return math.prod(map(len, self.axes.values()))

    def __iter__(self) -> Iterator[Request]:
        for values in itertools.product(*self.axes.values()):
            yield Request(**dict(zip(self.axes, values, strict=True)))

    def __getitem__(self, index: int) -> Request:
        chosen = {}
        for name, values in reversed(self.axes.items()):
            index, place = divmod(index, len(values))
            chosen[name] = values[place]
        return Request(**chosen)

    @property
    def swept(self) -> dict[str, Sequence[Any]]:
        """The axes of more than one value: Z, Y and X of a grid, in this order."""
        return {name: values for name, values in self.axes.items() if len(values) > 1}


class Items(Sequence[Request]):
    """The items of all lines in order. They are made when asked for, so that a million take no memory."""

    def __init__(self, name: str, lines: Sequence[Line]):
        self.name, self.lines = name, lines
        self._ends = list(itertools.accumulate(line.count for line in lines))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Request]:
        return itertools.chain.from_iterable(self.lines)

    def prompts(self) -> Iterator[str]:
        """The texts of all lines, negative prompts as well; one that is in several lines comes several times."""
        for line in self.lines:
            yield from filter(None, (*line.axes.get("prompt", ()), *line.axes.get("negative_prompt", ())))

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
    words: Iterable[str] = (),
) -> Items:
    """The items of a job, checked as far as that needs no model.

    source: a job file, or its lines as mappings; None: flags alone are the job.
    flags: values, as a line has them, for the keys that a line does not have; they count faster than the line's.
    prompts: in place of source, a file with a prompt on each line, swept slowest; empty lines and those that start
    with # are left out.
    words: of textual inversions, which are text as they stand, brackets and all.
    Raises ValueError that lists the problems of all lines, or for YAML without PyYAML; OSError for a file that cannot
    be read.
    """
    if source is not None and prompts is not None:
        raise ValueError(f"give either a job or a file of prompts, not both {source} and {prompts}")
    flags = flags or {}
    if prompts is not None and "prompt" in flags:
        raise ValueError(f"give either prompts or a file of them, not both {brief(flags['prompt'])} and {prompts}")
    words = tuple(words)
    if prompts is not None:
        name, raw = str(prompts), ()
    elif source is None:
        name, raw = "options", [(None, {})]
    elif isinstance(source, str | os.PathLike):
        name, raw = str(source), read_lines(Path(source))
    else:
        name, raw = "job", enumerate(source, 1)
    problems, lines, count = Problems(name), [], 0
    defaults = _axes(flags, "options", problems, _texts_check(words, flags))
    if prompts is not None:
        lines = [Line(None, {"prompt": _prompts(prompts, problems, _texts_check(words, flags))} | defaults)]
        count = lines[0].count
    for number, given in raw:
        if not isinstance(given, Mapping):
            wrong = given if isinstance(given, Exception) else f"not a mapping of keys to values: {brief(given)}"
            problems.add(number, wrong)
            continue
        if "prompt_syntax" in given:  # in which the texts of the flags are then read
            given = {**given, **{key: value for key, value in flags.items() if key not in given}}
        own = _axes(given, number, problems, _texts_check(words, {**flags, **given}))
        if "prompt" not in given and "prompt" not in flags:
            problems.add(number, "has no prompt")
        lines.append(Line(number, own | {key: values for key, values in defaults.items() if key not in given}))
        count += lines[-1].count
        if count > MAX_PICTURES:
            break
    if count > MAX_PICTURES:
        problems.add(None, f"{count:,} pictures, more than {MAX_PICTURES:,}; make it several jobs")
    elif not count and not problems:
        problems.add(None, "names no picture")
    problems.raise_any()
    _check_repeats(name, lines)
    return Items(name, lines)


def check(items: Items, pipe: "StableDiffusionPipeline") -> Items:
    """The items with what they left to the model filled in, so that equal pictures have equal ids, checked against it.

    The scheduler stays None where it is the model's own. Raises ValueError that lists the problems of all lines: sizes
    that the VAE cannot have, steps and intervals that the sampler cannot take, layers that are not there. Sizes are not
    filled in where some pictures of a line start from pictures, or are controlled by some, of which each has its own.
    """
    from sdjax import inputs

    height, width = inputs.picture_size(pipe)
    sizes = {"width": width, "height": height}  # of pictures that start from none
    always: dict[str, Any] = {"clip_skip": 0}
    if not pipe.config.get("force_zeros_for_empty_prompt"):  # else no negative prompt is not an empty one
        always["negative_prompt"] = ""
    defaults = Request("")
    problems, lines = Problems(items.name), []
    for line in items.lines:
        starts = {picture is not None for picture in line.axes.get("image", (None,))}
        if len(starts) > 1:
            problems.add(line.number, "image: null beside pictures; give what starts from none a line of its own")
        have_sizes = (True in starts and inputs.has_size_of_picture(pipe)) or any(line.axes.get("control_image", ()))
        is_plus = all(line.axes.get("cfg_plus_plus", (False,)))
        usual = {"guidance_scale": inputs.guidance_scale(pipe, cfg_plus_plus=is_plus), **always}
        fillings = usual if have_sizes else usual | sizes
        filled = {key: line.axes.get(key, (getattr(defaults, key),)) for key in (*line.axes, *fillings)}
        for key, value in fillings.items():
            if None in filled[key]:
                filled[key] = tuple(value if known is None else known for known in filled[key])
        own = filled | {"prompt": tuple(text for text in filled["prompt"] if "AND" in text) or ("",)}  # of millions
        for find, keys in inputs.CHECKS:
            for values in itertools.product(*(own.get(key, (getattr(defaults, key),)) for key in keys)):
                request = Request(**{"prompt": ""} | dict(zip(keys, values, strict=True)))
                if reason := refusal(lambda find=find, request=request: find(pipe, request)):
                    problems.add(line.number, reason)
        lines.append(Line(line.number, filled))
    problems.raise_any()
    _check_repeats(items.name, lines)
    return Items(items.name, lines)


def lora_digests(items: Items) -> dict[str, str]:
    """The SHA-256 of the content of each LoRA that the items name."""
    names = {path for line in items.lines for loras in line.axes.get("loras", ()) for path, _ in loras}
    digests = {}
    for name in sorted(names):
        with lora_file(name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


ROWS = 50  # for which prompts that change are checked
TextCheck = Callable[[str, str], Any]
"""(field, text): raises ValueError for a text that cannot be read"""


def _texts_check(words: tuple[str, ...], settings: Mapping[str, Any]) -> TextCheck:
    """That of the syntax of these values; of several, the web UI's, since the plain one takes any text."""
    from sdjax.text import editing, prompts, tokenizer

    default = FIELDS["prompt_syntax"].default
    value = settings.get("prompt_syntax", default)
    is_plain = all(one == PLAIN for one in (value if is_listed(value) else [value]))
    syntax = PLAIN if is_plain else default
    pattern = tokenizer.words_pattern(words)

    def check(field: str, text: str) -> None:
        for part in prompts.texts_of(field, text, syntax):
            for own in set(editing.by_row(part, ROWS, syntax, pattern)):
                prompts.parse(own, pattern, syntax)

    return check


def _axes(
    given: Mapping[str, Any], place: int | str | None, problems: Problems, check_text: TextCheck
) -> dict[str, Sequence[Any]]:
    """The values of each key, checked; what is wrong goes to problems."""
    axes = {}
    for key, value in given.items():
        try:
            axes[key] = _values(key, value, check_text)
        except ValueError as error:
            problems.add(place, error)
    return axes


def _values(key: str, value: Any, check_text: TextCheck) -> Sequence[Any]:
    """The values of a key, of which there may be one or a list. Raises ValueError that names the key."""
    values = spec(key).values(value)
    for text in values if spec(key).kind is TEXT else ():
        if reason := refusal(lambda text=text: check_text(key, text or "")):
            raise ValueError(f"{key}: {reason}")
    if key == "scheduler" and any(not isinstance(name, str | None) for name in values):
        raise ValueError(f"{key} must be the name of a sampler, not a config")
    return values


def _prompts(path: str | os.PathLike, problems: Problems, check_text: TextCheck) -> tuple[str, ...]:
    """The prompts of a file that has one on each line."""
    first: dict[str, int] = {}
    for number, prompt in read_prompts(path):
        if prompt in first:
            problems.add(number, f"the prompt of line {first[prompt]} again: {brief(prompt)}")
            continue
        first[prompt] = number
        if len(first) > MAX_PICTURES:
            break
        if reason := refusal(lambda prompt=prompt: _values("prompt", prompt, check_text)):
            problems.add(number, reason)
    return tuple(first)


def _check_repeats(name: str, lines: Sequence[Line]) -> None:
    """Raises ValueError that lists the lines with an item that was there before."""
    problems = Problems(name)
    for line in lines:
        for key, values in line.axes.items():
            if not isinstance(values, range) and len(set(values)) < len(values):
                twice, _ = Counter(values).most_common(1)[0]
                problems.add(line.number, f"{key} has {brief(twice)} twice")
        given = [name for name in ("timesteps", "sigmas") if any(line.axes.get(name, ()))]
        if given and len(line.axes.get("num_inference_steps", ())) > 1:
            problems.add(line.number, f"num_inference_steps is a list, and {given[0]} says how many there are")
    problems.raise_any()
    uses = Counter(prompt for line in lines for prompt in line.axes["prompt"])
    first: dict[Request, int | None] = {}
    for line in lines:
        if max(uses[prompt] for prompt in line.axes["prompt"]) == 1:
            continue
        for item in line:
            if uses[item.prompt] > 1 and first.setdefault(item, line.number) != line.number:
                again = f"seed {item.seed} of {brief(item.prompt)}"
                problems.add(line.number, f"makes the picture of line {first[item]} again: {again}")
                break
    problems.raise_any()
