"""What JAX compiles."""

from contextlib import contextmanager

import jax

from sdjax.runtime.compiler_memory import COMPILED


@contextmanager
def compilations():
    """Counts the programs that the backend compiles or takes from the disk cache."""
    names = []

    def listener(event, duration, **kw):
        if event == COMPILED:
            names.append(kw.get("fun_name", event))

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
