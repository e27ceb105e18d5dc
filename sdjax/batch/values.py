"""What a line of a job may say of each key, and the values that this stands for."""

import difflib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from sdjax.arguments import MAX_SEED, whole
from sdjax.options import parse_interval, parse_lora, seed_ranges

MAX_ITEMS = 10_000_000
OTHERWISE_CALLED = {
    "sampler": "scheduler",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "size": "width and height",
}
"""Names of the command's options and of other tools for these keys"""


def values_of(key: str, value: Any) -> Sequence[Any]:
    """The values of a key, of which there may be one or a list. Raises ValueError that names the key."""
    if key not in AXES:
        raise ValueError(f"unknown key {key!r}{hint(key)}")
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
        seed = whole(key, value, 0, MAX_SEED)
        return [range(seed, seed + 1)]
    return list(seed_ranges(key, value))


def _finite(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key} must be a finite number, not {value!r}")
    return float(value)


def _text(key: str, value: Any) -> str:
    from sdjax.text import prompts

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
    from sdjax.sampling import from_config

    from_config(name)


def _noise(key: str, value: Any) -> str:
    from sdjax import arguments
    from sdjax.sampling import noise

    arguments.one_of(key, value, ("jax", *noise.KINDS))
    return value


def _interval(key: str, value: Any) -> tuple[float, float] | None:
    if not isinstance(value, str):
        raise ValueError(f'{key} must be text, such as "0.3:5", not {value!r}')
    return parse_interval(key, value)


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, not {value!r}")
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
            lora_file(path)
        except OSError as error:
            raise ValueError(f"{key}: {error}") from None
    return tuple(pairs)


@cache
def lora_file(path: str) -> Path:
    """The file of a LoRA, of this machine or from the Hub. Raises OSError where there is none."""
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
    "num_inference_steps": _each(partial(whole, least=1)),
    "guidance_scale": _each(_finite, optional=True),
    "width": _each(partial(whole, least=1), optional=True),
    "height": _each(partial(whole, least=1), optional=True),
    "clip_skip": _each(partial(whole, least=0), optional=True),
    "noise": _each(_noise),
    "loras": _each(_loras),
    "guidance_interval": _each(_interval, optional=True),
    "cache_interval": _each(partial(whole, least=1), optional=True),
    "vae_tiling": _each(_flag),
}
"""From what a line says of a key, as a list, to its values as `Item` has them; ValueError names the key"""


def hint(key: Any) -> str:
    """The key that an unknown one may stand for, or all of them: the end of a message."""
    close = difflib.get_close_matches(str(key), AXES, n=1)
    close = [OTHERWISE_CALLED[key]] if key in OTHERWISE_CALLED else close
    return f"; did you mean {close[0]}?" if close else f"; the keys are {', '.join(AXES)}"
