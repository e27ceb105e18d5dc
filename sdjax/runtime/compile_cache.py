"""JAX's disk cache of compiled programs, on by default."""

import os

import jax
import platformdirs

MIN_COMPILE_SECONDS = 0.0  # every one: a process needs few programs, and none should be compiled a second time


def enable() -> None:
    """Keeps compiled programs in the user's cache folder, so that a second process compiles nothing.

    JAX's own settings win: JAX_COMPILATION_CACHE_DIR, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS, jax.config. Without a
    folder that can be written there is no cache, and no error.
    """
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    if jax.config.jax_compilation_cache_dir is None:
        folder = platformdirs.user_cache_path("sdjax", appauthor=False) / "compiled"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return
        if os.access(folder, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", str(folder))
