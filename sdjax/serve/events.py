"""Server-sent events."""

import json
from typing import Any


def event(name: str, data: Any) -> str:
    """One event, whose data is JSON."""
    return f"event: {name}\ndata: {json.dumps(data, allow_nan=False)}\n\n"
