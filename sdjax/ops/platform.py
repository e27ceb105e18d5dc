"""One function in several forms, of which the platform decides."""

from collections.abc import Callable, Mapping
from typing import Any

import jax


def by_platform(forms: Mapping[str, Callable[..., Any]], default: Callable[..., Any], *operands: Any) -> Any:
    """The form of the platform that the program is lowered for, of these operands; default where it has none."""
    return jax.lax.platform_dependent(*operands, **forms, default=default) if forms else default(*operands)
