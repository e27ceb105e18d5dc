"""The scale of a change in a LoRA file: alpha / rank, alpha the file's own or that of PEFT's config."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sdjax.checkpoints.lora_kinds import NOT_FINITE, Misfit, Scaling


def scaling(config: Mapping[str, Any], component: str, path: str, alpha: np.ndarray | None) -> Scaling:
    """The scale of a module of a component as a function of its rank, None for a change that is no product.

    alpha: that of the file, which says nothing of what is no product: there files have any number. config: PEFT's,
    where a component's name may stand before each field. Without either the scale is 1.
    """

    def field(name: str) -> Any:
        return config.get(f"{component}.{name}", config.get(name))

    def own(patterns: str, *names: str) -> Any:
        matches = (value for key, value in (field(patterns) or {}).items() if re.match(rf"(.*\.)?({key})$", path))
        return next(matches, next((field(name) for name in names if field(name) is not None), None))

    def scale(rank: int | None) -> float:
        if alpha is not None:
            return _finite(alpha) / rank if rank else 1.0
        try:
            chosen, rank = own("alpha_pattern", "lora_alpha", "alpha"), rank or own("rank_pattern", "r")
            return 1.0 if chosen is None or not rank else chosen / (rank**0.5 if field("use_rslora") else rank)
        except (AttributeError, TypeError, re.error) as error:
            raise Misfit(f"PEFT's config gives no scale ({error})") from error

    return scale


def _finite(alpha: np.ndarray) -> float:
    if not math.isfinite(value := float(alpha.item())):
        raise Misfit(NOT_FINITE)
    return value
