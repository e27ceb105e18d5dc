"""JAX's disk cache of compiled programs, which the first pipeline turns on."""

import os

import jax
import platformdirs
from jax.experimental.compilation_cache import compilation_cache

MIN_COMPILE_SECONDS = 0.0  # every one: a process needs few programs, and none should be compiled a second time


def enable() -> None:
    """Keeps compiled programs in the user's cache folder, so that a second process compiles nothing.

    Where a folder is chosen already, by JAX_COMPILATION_CACHE_DIR or jax.config, this changes nothing, and
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS stays what it is. Without a folder that can be written there is no cache,
    and no error.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    folder = platformdirs.user_cache_path("sdjax", appauthor=False) / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
        compilation_cache.reset_cache()  # which looks for a folder once, at the first compilation
