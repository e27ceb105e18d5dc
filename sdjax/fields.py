"""Values from files, checked against the type and the range of their field: those of a dataclass, or of a table."""

import reprlib
from collections.abc import Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

LARGEST = 3.4e38  # a float32 holds it
LONGEST_NUMBER = 400  # digits; Python counts in the square of them, and floats have 309
NAMES = {bool: "true or false", str: "a text", NoneType: "null", Any: "anything"}
MISFIT = object()

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60
_repr.maxlevel = 3


class Within(NamedTuple):
    """The limits of a number, or of the length of a text or a list. Both are allowed."""

    least: float
    most: float


Channels = Annotated[int, Within(1, 2**16)]
Levels = Within(1, 6)
Id = Annotated[int, Within(0, 2**22)]
Epsilon = Annotated[float, Within(1e-12, 0.1)]
Scale = Annotated[float, Within(1e-6, 1e6)]


def brief(value: Any) -> str:
    """A repr of bounded length and depth, for values that come from elsewhere."""
    try:
        return _repr.repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return f"a {type(value).__name__} too long to show"


def whole(digits: str) -> int:
    """The number of these digits, as `parse_int` of JSON. Raises ValueError for more than any number here has."""
    check_digits(digits)
    return int(digits)


def check_digits(number: str) -> None:
    """Raises ValueError for a number of more digits than any here has."""
    if len(number) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(number):,} digits")


def encodable(text: str) -> str:
    r"""The text with \udcff for half a character, as which Python has a byte of a path that is no UTF-8.

    JSON is then read as before.
    """
    return text.encode("utf-8", "backslashreplace").decode()


def checked(name: str, value: Any, kind: Any) -> Any:
    """The value, lists as tuples. Raises ValueError that begins with the name unless it is of this kind.

    kind: bool, int, float (finite), str, None, a tuple, a dict by names, a union of these, each Annotated with Within
    or not. A whole number is a float as well.
    """
    found = _fitting(value, kind)
    if found is MISFIT:
        raise ValueError(f"{name}={brief(value)}: must be {_described(kind)}")
    return found


@cache
def kinds_of(cls: type) -> Mapping[str, Any]:
    """The kinds of a dataclass's fields, by name."""
    hints = get_type_hints(cls, include_extras=True)
    return {name: hints[name] for name in cls.__dataclass_fields__}


def _fitting(value: Any, kind: Any) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        found = _fitting(value, args[0])
        size = len(found) if isinstance(found, str | tuple | dict) else found
        return found if found is MISFIT or args[1].least <= size <= args[1].most else MISFIT
    if origin in (Union, UnionType):
        return next((found for one in args if (found := _fitting(value, one)) is not MISFIT), MISFIT)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return MISFIT
        kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        parts = tuple(map(_fitting, value, kinds)) if len(kinds) == len(value) else (MISFIT,)
        return MISFIT if any(part is MISFIT for part in parts) else parts
    if origin is dict:
        fits = isinstance(value, Mapping) and all(
            isinstance(name, str) and _fitting(own, args[1]) is not MISFIT for name, own in value.items()
        )
        return value if fits else MISFIT
    if kind is float:
        return value if _is_number(value, int | float) and -LARGEST <= value <= LARGEST else MISFIT
    return value if kind is Any or (_is_number(value, int) if kind is int else isinstance(value, kind)) else MISFIT


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _described(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        own, (least, most) = get_args(kind)
        limits = f" from {least:g} to {most:g}" if own in (int, float) else f" of length {least} to {most}"
        return _described(own) + limits
    if origin in (Union, UnionType):
        return " or ".join(map(_described, args))
    if origin is tuple:
        return f"a list of ({', '.join(_described(one) for one in args if one is not Ellipsis)})"
    if origin is dict:
        return f"an object of ({_described(args[1])})"
    return {int: "a whole number", float: "a finite number"}.get(kind) or NAMES.get(kind) or f"a {kind.__name__}"
