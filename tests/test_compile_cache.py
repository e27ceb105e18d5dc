"""sdjax.runtime.compile_cache: where compiled programs are kept, and that a second process finds them."""

import os
import subprocess
import sys

import jax
import pytest

from sdjax.runtime import compile_cache

NAMES = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """JAX's settings after enable(), with the user's cache folder in tmp_path; put back at the end."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    monkeypatch.setattr(compile_cache.platformdirs, "user_cache_path", lambda *_, **__: tmp_path / "user" / "sdjax")

    def settings(folder=None, seconds=1.0):
        for name, value in zip(NAMES, (folder, seconds), strict=True):
            jax.config.update(name, value)
        compile_cache.enable()
        return [getattr(jax.config, name) for name in NAMES]

    yield settings
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_the_users_cache_folder(settings, tmp_path):
    assert settings() == [str(tmp_path / "user" / "sdjax" / "compiled"), compile_cache.MIN_COMPILE_SECONDS]
    assert (tmp_path / "user" / "sdjax" / "compiled").is_dir()


def test_jax_settings_win(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "3")
    assert settings(str(tmp_path / "mine"), 3.0) == [str(tmp_path / "mine"), 3.0]
    assert not (tmp_path / "user").exists()


def test_no_folder_no_cache_and_no_error(settings, tmp_path):
    (tmp_path / "user").write_text("a file where the folder should be")
    assert settings()[0] is None


PROGRAM = """
import jax, jax.numpy as jnp
from sdjax.runtime import compile_cache
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
compile_cache.enable()
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).block_until_ready()
print(sum(event.endswith("cache_misses") for event in events), sum(event.endswith("cache_hits") for event in events))
"""


def test_a_second_process_compiles_nothing(tmp_path):
    def misses_and_hits():
        folders = {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
        own = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
        environment = {name: value for name, value in os.environ.items() if name not in own} | folders
        result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr
        return tuple(map(int, result.stdout.split()))

    misses, hits = misses_and_hits()
    assert misses > 0 and hits == 0
    assert misses_and_hits() == (0, misses)
