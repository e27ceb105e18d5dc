"""The scale of a change in a LoRA file: alpha / rank, alpha the file's own or that of PEFT's config."""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np

from sdjax.checkpoints.lora_kinds import NOT_FINITE, Misfit, Scaling
from sdjax.fields import Within, brief

Alpha = Annotated[float, Within(-1e6, 1e6)]
Rank = Annotated[int, Within(0, 2**16)]
FIELDS = {
    "r": Rank | None,
    "lora_alpha": Alpha | None,
    "alpha": Alpha | None,
    "rank_pattern": Annotated[dict[str, Rank], Within(0, 5000)] | None,
    "alpha_pattern": Annotated[dict[str, Alpha], Within(0, 5000)] | None,
    "use_rslora": bool | None,
}
"""Of PEFT's config those that the scale depends on, and their kinds"""
PLAIN = re.compile(r"[\w.-]+")
SLOW = re.compile(r"\)[*+?{]|\\\d|(?:[*+?{].*){3}")  # repeated groups, references, more than two repetitions
LONGEST_PATTERN = 250


def scaling(config: Mapping[str, Any], component: str, path: str, alpha: np.ndarray | None) -> Scaling:
    """The scale of a module of a component as a function of its rank, None for a change that is no product.

    alpha: that of the file, which says nothing of what is no product: there files have any number. config: PEFT's,
    where a component's name may stand before each field. Without either the scale is 1.
    """

    def field(name: str) -> Any:
        return config.get(f"{component}.{name}", config.get(name))

    def own(patterns: str, *names: str) -> Any:
        matches = (value for key, value in (field(patterns) or {}).items() if _matches(key, path))
        return next(matches, next((field(name) for name in names if field(name) is not None), None))

    def scale(rank: int | None) -> float:
        if alpha is not None:
            return _finite(alpha) / rank if rank else 1.0
        chosen, rank = own("alpha_pattern", "lora_alpha", "alpha"), rank or own("rank_pattern", "r")
        return 1.0 if chosen is None or not rank else chosen / (rank**0.5 if field("use_rslora") else rank)

    return scale


def _matches(pattern: str, path: str) -> bool:
    """Whether the end of a path matches PEFT's pattern, as a rule a path itself.

    Raises Misfit for one that is no regular expression, and for one that could take forever.
    """
    if PLAIN.fullmatch(pattern):
        return f".{path}".endswith(f".{pattern}")
    if len(pattern) > LONGEST_PATTERN or SLOW.search(pattern):
        raise Misfit(f"PEFT's config has a pattern that is not supported: {brief(pattern)}")
    try:
        return bool(re.match(rf"(.*\.)?({pattern})$", path))
    except (re.error, OverflowError, RecursionError) as error:
        raise Misfit(f"PEFT's config gives no scale ({error})") from error


def _finite(alpha: np.ndarray) -> float:
    if not math.isfinite(value := float(alpha.item())):
        raise Misfit(NOT_FINITE)
    return value
