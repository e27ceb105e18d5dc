"""What JAX compiles."""

from contextlib import contextmanager
from functools import cache

import jax

from sdjax.runtime.compiler_memory import COMPILED


@cache
def _counted():
    """The lists of those who count; one listener adds to all. JAX before 0.8 has no way to remove a listener."""
    counted = []

    def listener(event, duration, **kw):
        if event == COMPILED:
            for names in counted:
                names.append(kw.get("fun_name", event))

    jax.monitoring.register_event_duration_secs_listener(listener)
    return counted


@contextmanager
def compilations():
    """Counts the programs that the backend compiles or takes from the disk cache."""
    names, counted = [], _counted()
    counted.append(names)
    try:
        yield names
    finally:
        counted[:] = [own for own in counted if own is not names]
