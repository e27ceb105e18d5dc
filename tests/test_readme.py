"""What the README tells a reader to run runs."""

import re
from functools import partial
from pathlib import Path

import jax
import pytest

import sdjax

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(autouse=True)
def compiled_quickly():
    """Programs that are run once or twice are not worth compiling well."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def run(block: str) -> None:
    """With two steps: how good the pictures of more are is asserted elsewhere."""
    short, found = re.subn(r"(num_inference_steps=|\.table\()\d+", r"\g<1>2", block)
    assert found == 1
    exec(compile(short, "README.md", "exec"), {})


@pytest.mark.parametrize("block", BLOCKS[:2], ids=["pipeline", "by-hand"])
def test_python_of_the_readme_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(block)


def test_python_of_the_pure_function_runs(one_level_folder, monkeypatch):
    """In place of the embedded model a tiny one, whose gradient compiles in seconds."""
    [block] = BLOCKS[2:]
    load = sdjax.StableDiffusionPipeline.from_pretrained
    monkeypatch.setattr(sdjax.StableDiffusionPipeline, "from_pretrained", partial(load, one_level_folder))
    run(block)
