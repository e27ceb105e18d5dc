"""Jobs of many pictures: read, checked, planned, and sampled so that no picture is lost or made twice."""

from functools import partial

from sdjax.lazy import attribute

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

__getattr__ = partial(attribute, __name__, HOME)  # the command's options are found without JAX
