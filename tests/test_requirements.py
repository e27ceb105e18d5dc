"""A JAX or Flax below what sdjax's metadata names is refused, before it is imported, in one line."""

import subprocess
import sys

import pytest

import sdjax
from sdjax.runtime import requirements


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function after which another version of a package seems to be installed."""

    def pretend(name, version):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
        requirements.outdated.cache_clear()

    yield pretend
    requirements.outdated.cache_clear()


def test_what_is_installed_is_new_enough():
    assert requirements.outdated() is None


@pytest.mark.parametrize(
    ("name", "version"), [("jax", "0.6.2"), ("jax", "0.7.1"), ("flax", "0.11.2"), ("jax", "0.4.38.dev1")]
)
def test_an_old_one_is_refused_with_what_to_install(install, name, version):
    install(name, version)
    with pytest.raises(
        ImportError, match=rf'^sdjax needs "{name}>=\S+", and {name} {version} is installed: pip install -U "'
    ):
        sdjax.StableDiffusionPipeline  # noqa: B018


@pytest.mark.parametrize("version", ["0.7.2", "0.7.2.dev20250901", "0.10.0", "1.0"])
def test_newer_ones_are_taken(install, version):
    install("jax", version)
    assert requirements.outdated() is None


def test_the_command_says_so_in_one_line(install):
    install("jax", "0.6.2")
    result = subprocess.run([sys.executable, "-m", "sdjax", "samplers"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith('error: sdjax needs "jax>=') and result.stderr.count("\n") == 1
