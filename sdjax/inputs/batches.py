"""Fields of the requests of a batch."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sdjax.request import Request


def column(requests: Sequence[Request], name: str, default: Any) -> np.ndarray:
    """[B] the values of a field, `default` where it is None."""
    values = (getattr(request, name) for request in requests)
    return np.array([default if value is None else value for value in values])


def shared(requests: Sequence[Request], name: str) -> Any:
    """The value that all requests of a batch have of a field. Raises ValueError where there are several."""
    values = list(dict.fromkeys(getattr(request, name) for request in requests))
    if len(values) > 1:
        raise ValueError(f"{name}: the pictures of a batch share it, and these have {values[0]!r} and {values[1]!r}")
    return values[0]
