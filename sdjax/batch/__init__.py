"""Jobs of many pictures: read, checked, planned, and sampled so that no picture is lost or made twice."""

from importlib import import_module
from typing import Any

HOME = {
    "Interrupted": "sdjax.batch.interruption",
    "LockedError": "sdjax.batch.lock",
    "Progress": "sdjax.batch.progress",
    "Status": "sdjax.batch.report",
    "Summary": "sdjax.batch.runner",
    "UnfinishedError": "sdjax.batch.interruption",
    "join": "sdjax.batch.processes",
    "run": "sdjax.batch.runner",
    "status": "sdjax.batch.report",
}

__all__ = [*HOME]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for: the command's options are found without JAX."""
    if name not in HOME:
        raise AttributeError(f"module 'sdjax.batch' has no attribute {name!r}")
    return getattr(import_module(HOME[name]), name)
