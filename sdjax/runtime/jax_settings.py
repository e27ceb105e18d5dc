"""The settings of JAX that decide what a program computes: one value each, whatever the caller has chosen."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import jax

if hasattr(jax, "enable_x64"):
    from jax import enable_x64
else:  # before 0.8
    from jax.experimental import enable_x64

FIXED = (
    (enable_x64, False),
    (jax.numpy_dtype_promotion, "standard"),
    (jax.numpy_rank_promotion, "allow"),
    (jax.threefry_partitionable, True),
    (jax.disable_jit, False),
)
"""Context managers and their values, which are JAX's defaults. Precision and debugging are the caller's to choose."""


@contextmanager
def fixed() -> Iterator[None]:
    """Within it, and within a function that it decorates, JAX has the settings of FIXED."""
    with ExitStack() as stack:
        for setting, value in FIXED:
            stack.enter_context(setting(value))
        yield
