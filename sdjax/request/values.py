"""The checks of the values of a request, and their forms as text. No JAX."""

import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from sdjax.fields import brief

MAX_SEED = 2**64 - 1
MAX_PICTURES = 10_000_000
MAX_SIDE = 1_000_000  # of a picture, in pixels
LARGEST = 1e6  # of numbers that models are given: their products stay finite
NOISE = ("jax", "torch", "cuda")
UPSCALERS = ("latent", "lanczos", "model")
PLAIN = "plain"
PROMPT_SYNTAXES = ("web-ui", PLAIN)


def is_listed(value: Any) -> bool:
    """Whether this is a list, a range, an array with axes or another iterable of values."""
    return (
        isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping) and getattr(value, "ndim", 1) > 0
    )


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """The value as an int. Raises ValueError unless it is a whole number in these limits."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        limits = f"{least} or more" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be a whole number, {limits}, not {brief(value)}")
    return number


def finite(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """The value as a float. Raises ValueError unless it is a finite number in these limits."""
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or not least <= number <= most:
        limits = "" if (least, most) == (-math.inf, math.inf) else f" from {least:g} to {most:g}"
        raise ValueError(f"{name} must be a finite number{limits}, not {brief(value)}")
    return number


def one_of(name: str, value: Any, choices: Iterable[str]) -> str:
    """The value. Raises ValueError unless it is one of the choices."""
    if value not in (known := list(choices)):
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {brief(value)}")
    return value


def text(name: str, value: Any) -> str:
    """The value. Raises ValueError unless it is text, of characters that UTF-8 has."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text or a list of texts, not {brief(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        what = f"character {error.start}, {value[error.start]!r}, is half of one, or a byte that is no UTF-8"
        raise ValueError(f"{name} must be text of whole characters: {what}") from None
    return value


def flag(name: str, value: Any) -> bool:
    """The value. Raises ValueError unless it is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, not {brief(value)}")
    return value


def sampler(name: str, value: Any) -> Any:
    """A sampler's name, or the `Scheduler` of its config. Raises ValueError for what is neither."""
    from sdjax.sampling import Scheduler

    if isinstance(value, str):
        _named(value)
        return value
    if isinstance(value, Scheduler):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be the name of a sampler, a scheduler or its config, not {brief(value)}")
    return _named(value)


def _named(config: Any) -> Any:
    from sdjax.sampling import from_config

    return from_config(config)


def sampler_json(value: Any) -> Any:
    """Its name, or its config."""
    return value if isinstance(value, str) else dict(value.config)


def seed(name: str, value: Any) -> int:
    """The value as an int. Raises ValueError unless it is a whole number from 0 to 2^64 - 1."""
    try:
        return whole(name, value, 0, MAX_SEED)
    except ValueError:
        raise ValueError(f"{name} must be a whole number from 0 to 2^64 - 1, not {brief(value)}") from None


def seeds(name: str, values: Iterable[Any]) -> Sequence[int]:
    """[7, '8:11'] -> (7, 8, 9, 10); one range stays a range, which takes no memory."""
    ranges: list[range] = []
    for value in [values] if isinstance(values, range) and values.step == 1 else values:
        if isinstance(value, str):
            ranges += seed_ranges(name, value)
        elif isinstance(value, range):
            ranges.append(range(seed(name, value.start), seed(name, value.stop - 1) + 1) if value else value)
        else:
            ranges.append(range(seed(name, value), seed(name, value) + 1))
    if sum(part.stop - part.start for part in ranges) > MAX_PICTURES:  # which may be too long for len
        raise ValueError(f"{name}: more than {MAX_PICTURES:,} seeds")
    return ranges[0] if len(ranges) == 1 else tuple(one for part in ranges for one in part)


def seed_ranges(name: str, text: str) -> Iterator[range]:
    """'1,8:11' -> range(1, 2), range(8, 11). Raises ValueError that begins with the name."""
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,20})(?::(\d{1,20}))?", part.strip(), re.ASCII)
        if not match:
            raise ValueError(f"{name} {brief(text)[1:-1]}: {brief(part)} is neither a seed (7) nor a range (0:16)")
        start = int(match[1])
        stop = start + 1 if match[2] is None else int(match[2])
        if not start < stop <= MAX_SEED + 1:
            raise ValueError(f"{name} {brief(text)[1:-1]}: {brief(part)} names no seeds from 0 to 2^64 - 1")
        yield range(start, stop)


def _float(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError("true and false are no numbers")
    return float(value)


def interval(name: str, value: Any) -> tuple[float, float]:
    """'0.3:5' or (0.3, 5) -> (0.3, 5.0); '0.3:inf' -> (0.3, inf). Raises ValueError unless 0 <= low < high."""
    try:
        low, high = map(_float, value.split(":") if isinstance(value, str) else value)
    except (TypeError, ValueError, OverflowError):
        low, high = math.nan, math.nan
    if not 0 <= low < high:
        raise ValueError(
            f"{name} must be two noise levels LOW:HIGH, 0 <= LOW < HIGH, such as 0.3:5, not {brief(value)}"
        )
    return low, high


def interval_text(value: tuple[float, float]) -> str:
    """(0.3, 5.0) -> '0.3:5.0', which `interval` reads to the same numbers."""
    return ":".join(map(str, value))


def numbers(name: str, value: Any) -> tuple[float, ...]:
    """'999,499.5' or (999, 499.5) -> (999.0, 499.5). Raises ValueError unless it is one finite number or more."""
    try:
        found = tuple(map(_float, value.split(",") if isinstance(value, str) else value))
    except (TypeError, ValueError, OverflowError):
        found = ()
    if not found or not all(map(math.isfinite, found)):
        raise ValueError(f"{name} must be numbers, such as 999,749.5,499, not {brief(value)}")
    return found


def numbers_text(value: tuple[float, ...]) -> str:
    """(999.0, 499.5) -> '999,499.5', which `numbers` reads to the same numbers."""
    return ",".join(str(int(number) if number.is_integer() else number) for number in value)


def bounded_numbers(name: str, value: Any, least: float, most: float) -> tuple[float, ...]:
    """0.5, '0.5,1' or (0.5, 1) -> a tuple of them. Raises ValueError unless they are in these limits."""
    listed = value.split(",") if isinstance(value, str) else value if is_listed(value) else (value,)
    try:
        found = tuple(map(_float, listed))
    except (TypeError, ValueError, OverflowError):
        found = ()
    if not found or not all(least <= number <= most for number in found):
        limits = f"from {least:g} to {most:g}"
        raise ValueError(f"{name} must be numbers {limits}, such as 0.8 or 0.8,0.5, not {brief(value)}")
    return found


def whole_numbers(name: str, value: Any, most: int) -> tuple[int, ...]:
    """3, '0,3' or (0, 3) -> a tuple of them. Raises ValueError unless they are whole numbers from 0 to `most`."""
    listed = value.split(",") if isinstance(value, str) else value if is_listed(value) else (value,)
    found = tuple(int(own) if isinstance(own, str) and own.strip().isdecimal() else own for own in listed)
    if not found:
        raise ValueError(f"{name} is an empty list")
    return tuple(whole(name, own, 0, most) for own in found)


def words(name: str, value: Any) -> tuple[str, ...]:
    """'canny,none' or ('canny', 'none') -> ('canny', 'none'). Raises ValueError unless it is a word or more."""
    found = value.split(",") if isinstance(value, str) else value if is_listed(value) else ()
    found = tuple(word.strip() if isinstance(word, str) else word for word in found)
    if not found or not all(isinstance(word, str) and re.fullmatch(r"[\w.]+", word) for word in found):
        raise ValueError(f"{name} must be a word, or words such as canny,none, not {brief(value)}")
    return found


Scale = float | tuple[tuple[str, float], ...]
"""Of an IP-Adapter: a number, or one for each of the blocks that are named"""


def scales(name: str, value: Any) -> tuple[Scale, ...]:
    """0.5, (0.5, 1) or '0.5,1' -> a tuple of them; {"up": {"block_0": [0, 1]}} as one of them, as PyTorch diffusers has
    it -> (('up.block_0.0', 0.0), ('up.block_0.1', 1.0)). Raises ValueError unless all are finite numbers."""
    listed = numbers(name, value) if isinstance(value, str) else value if is_listed(value) else (value,)
    found = tuple(
        tuple(sorted(_by_block(name, one))) if isinstance(one, Mapping) else finite(name, one, -LARGEST, LARGEST)
        for one in listed
    )
    if not found or () in found:
        raise ValueError(f"{name} must be numbers, such as 0.6, not {brief(value)}")
    return found


def _by_block(name: str, value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, float]]:
    """(name of a block, number) of nested mappings and lists; a list of one number is that number."""
    parts = value.items() if isinstance(value, Mapping) else enumerate(value) if is_listed(value) else None
    if parts is None:
        yield ".".join(path), finite(f"{name}: {'.'.join(path)}", value, -LARGEST, LARGEST)
    elif len(path) == 3:
        raise ValueError(f"{name}: {'.'.join(path)} is no block's: such are up, up.block_0 and up.block_0.1")
    else:
        listed = list(parts)
        is_one = len(listed) == 1 and not isinstance(value, Mapping)
        for part, own in listed:
            yield from _by_block(name, own, path if is_one else (*path, str(part)))


def json_of_scales(value: tuple[Scale, ...]) -> Any:
    """What `scales` takes back: a text where there are but numbers."""
    if any(isinstance(one, tuple) for one in value):
        return [dict(one) if isinstance(one, tuple) else one for one in value]
    return numbers_text(value)


def pair(name: str, value: Any) -> tuple[int, int]:
    """'1024x768' or (1024, 768) -> (1024, 768). Raises ValueError unless it is two whole numbers."""
    try:
        first, second = map(int, value.split("x")) if isinstance(value, str) else value
        return whole(name, first, 0, int(LARGEST)), whole(name, second, 0, int(LARGEST))
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be (height, width), two whole numbers, not {brief(value)}") from None


def pair_text(value: tuple[int, int]) -> str:
    """(1024, 768) -> '1024x768', which `pair` reads."""
    return "{}x{}".format(*value)


def margins(name: str, value: Any) -> tuple[int, int, int, int]:
    """'64,0,64,0' or (64, 0, 64, 0) -> (64, 0, 64, 0). Raises ValueError unless it is four sizes, not all of them 0."""
    try:
        left, top, right, bottom = map(int, value.split(",")) if isinstance(value, str) else value
        found = tuple(whole(name, side, 0, MAX_SIDE) for side in (left, top, right, bottom))
    except (TypeError, ValueError):
        found = (0,)
    if not any(found):
        raise ValueError(f"{name} must be LEFT,TOP,RIGHT,BOTTOM in pixels, such as 64,0,64,0, not {brief(value)}")
    return found


def margins_text(value: tuple[int, ...]) -> str:
    """(64, 0, 64, 0) -> '64,0,64,0', which `margins` reads."""
    return ",".join(map(str, value))


def parse_lora(text: str) -> tuple[str, float]:
    """'style.safetensors:0.8' -> ('style.safetensors', 0.8); the weight is 1 by default."""
    match = re.fullmatch(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+))", text, re.ASCII)
    return (match[1], float(match[2])) if match else (text, 1.0)


def _are_pairs(value: Any) -> bool:
    """Whether this is None, or what `loras` gives."""
    return value is None or (isinstance(value, tuple) and all(isinstance(pair, tuple) for pair in value))


def loras(name: str, value: Any) -> tuple[tuple[str, float], ...]:
    """{'style.safetensors': 0.8} or 'style.safetensors:0.8' -> ((path, weight), …), sorted, of files that are there."""
    value = dict([parse_lora(value)]) if isinstance(value, str) else dict(value or ()) if _are_pairs(value) else value
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be {{path: weight}} or path:weight, not {brief(value)}")
    pairs = sorted((str(path), finite(f"{name}: the weight of {path}", weight)) for path, weight in value.items())
    for path, _ in pairs:
        try:
            lora_file(path)
        except OSError as error:
            raise ValueError(f"{name}: {error}") from None
    return tuple(pairs)


@cache
def lora_file(path: str) -> Path:
    """The file of a LoRA, of this machine or from the Hub. Raises OSError where there is none."""
    from sdjax.checkpoints import hub, lora

    return hub.resolve_file(path, lora.FILE_NAMES)


def picture(name: str, value: Any) -> Any:
    """The `Picture` of a file, a PIL picture or an array. Raises ValueError for what is none."""
    from sdjax.pictures.picture import read

    return read(name, value)


def is_one_picture(value: Any) -> bool:
    """Whether this is a picture, not several."""
    return not isinstance(value, list | tuple | Iterator) and getattr(value, "ndim", 0) < 4


def pictures(name: str, value: Any) -> Any:
    """A `Picture`, or several in a list -> a tuple of them. Raises ValueError for none, and as `picture`."""
    found = tuple(picture(name, one) for one in ([value] if is_one_picture(value) else value))
    if not found:
        raise ValueError(f"{name} is an empty list")
    return found


def pictures_each(name: str, value: Any) -> Any:
    """A `Picture`, or a list of what `pictures` takes -> a tuple of what it gives. Raises ValueError as it does."""
    found = tuple(pictures(name, own) for own in ([value] if is_one_picture(value) else value))
    if not found:
        raise ValueError(f"{name} is an empty list")
    return found
