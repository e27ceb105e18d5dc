"""Kinds of values that a request has: how each is checked, read from text and written as JSON. No JAX."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter, methodcaller
from typing import Any

from sdjax.request.values import (
    LARGEST,
    MAX_SIDE,
    bounded_numbers,
    finite,
    flag,
    interval,
    interval_text,
    is_listed,
    is_one_picture,
    json_of_scales,
    loras,
    margins,
    margins_text,
    numbers,
    numbers_text,
    one_of,
    pair,
    pair_text,
    picture,
    pictures,
    pictures_each,
    sampler,
    sampler_json,
    scales,
    seed,
    text,
    whole,
    whole_numbers,
    words,
)


def json_or_text(text: str) -> Any:
    """'8' -> 8, '0.5' -> 0.5, 'true' -> True; what is no JSON is text without white space around it."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text.strip()


def as_it_is(value: Any) -> Any:
    """The value."""
    return value


def _is_one(value: Any) -> bool:
    return not is_listed(value)


def _is_one_sequence(value: Any) -> bool:
    """A list of numbers is one value, a list of lists or texts several."""
    return not is_listed(value) or not any(is_listed(part) or isinstance(part, str) or part is None for part in value)


@dataclass(frozen=True)
class Kind:
    """A kind of value."""

    check: Callable[[str, Any], Any]
    """(name, value) -> the value as a `Request` has it. Raises ValueError that begins with the name."""
    parse: Callable[[str], Any] = json_or_text
    """from the text of an option or of a cell in CSV to what `check` takes"""
    json: Callable[[Any], Any] = as_it_is
    """from a checked value to JSON, which `check` takes back"""
    is_one: Callable[[Any], bool] = _is_one
    """whether this is one value, not a list of several"""
    content: Callable[[Any], Any] | None = None
    """from a checked value to the JSON that tells it from others; None: as `json`"""
    annotation: Any = str


def _is_one_of_words(value: Any) -> bool:
    """A list of words is one value, a list of lists several."""
    return not is_listed(value) or all(isinstance(part, str) for part in value)


TEXT = Kind(text, as_it_is)
FLAG = Kind(flag, annotation=bool)
SEED = Kind(seed, as_it_is, annotation=int)
COUNT = Kind(partial(whole, least=1), annotation=int)
SIDE = Kind(partial(whole, least=1, most=MAX_SIDE), annotation=int)
WHOLE = Kind(partial(whole, least=0), annotation=int)
PIXELS = Kind(partial(whole, least=0, most=4096), annotation=int)
NUMBER = Kind(partial(finite, least=-LARGEST, most=LARGEST), annotation=float)
SCALE = Kind(partial(finite, least=1.0, most=16.0), annotation=float)
FACTOR = Kind(partial(finite, least=0.0, most=LARGEST), annotation=float)
SHARE = Kind(partial(finite, least=0.0, most=1.0), annotation=float)
SAMPLER = Kind(sampler, json=sampler_json)
INTERVAL = Kind(interval, as_it_is, interval_text, _is_one_sequence, annotation=tuple[float, float])
NUMBERS = Kind(numbers, as_it_is, numbers_text, _is_one_sequence, annotation=Sequence[float])
PAIR = Kind(pair, as_it_is, pair_text, _is_one_sequence, annotation=tuple[int, int])
MARGINS = Kind(margins, as_it_is, margins_text, _is_one_sequence, annotation=tuple[int, int, int, int])
FACTORS = Kind(
    partial(bounded_numbers, least=0.0, most=LARGEST),
    json=numbers_text,
    annotation=float | Sequence[float],
)
ROW_OF_FACTORS = Kind(
    partial(bounded_numbers, least=0.0, most=LARGEST),
    as_it_is,
    numbers_text,
    _is_one_sequence,
    annotation=Sequence[float],
)
SHARES = Kind(
    partial(bounded_numbers, least=0.0, most=1.0),
    json=numbers_text,
    annotation=float | Sequence[float],
)
TYPES = Kind(partial(whole_numbers, most=63), json=margins_text, annotation=int | Sequence[int])
SCALES = Kind(scales, json=json_of_scales, annotation=Any)
LORAS = Kind(loras, json=dict)
PICTURE = Kind(picture, as_it_is, methodcaller("json"), is_one_picture, attrgetter("sha256"), annotation=Any)
WORDS = Kind(words, as_it_is, ",".join)
ONE_WORDS = Kind(words, as_it_is, ",".join, _is_one_of_words, annotation=Sequence[str])
PICTURES = Kind(
    pictures,
    json=lambda value: [one.json() for one in value],
    is_one=is_one_picture,
    content=lambda value: [one.sha256 for one in value],
    annotation=Any,
)

PICTURES_EACH = Kind(
    pictures_each,
    json=lambda value: [[one.json() for one in own] for own in value],
    is_one=is_one_picture,
    content=lambda value: [[one.sha256 for one in own] for own in value],
    annotation=Any,
)


def choice(choices: Sequence[str]) -> Kind:
    """One of these words."""
    return Kind(partial(one_of, choices=choices))
