"""What the compiler worked with, given back to the system."""

import ctypes
import sys

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event: compiled, or read from the disk cache
LEAST_SECONDS = 1.0  # below which there is little to give back


def enable() -> None:
    """Gives back, after each long compilation, the memory that it freed.

    The C library would keep it with the process: 0.7 GB after Stable Diffusion's UNet on a CPU. Only glibc does, and
    `malloc_trim` changes that; with another C library this does nothing.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):

        def give_back(event: str, seconds: float, **_: str | int) -> None:
            if event == COMPILED and seconds >= LEAST_SECONDS:
                libc.malloc_trim(0)

        jax.monitoring.register_event_duration_secs_listener(give_back)
