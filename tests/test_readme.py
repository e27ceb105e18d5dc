"""What the README tells a reader to run runs."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=["pipeline", "by-hand", "pure"])
def test_python_of_the_readme_runs(block, tmp_path, monkeypatch):
    """With two steps: how good the pictures of more are is asserted elsewhere."""
    monkeypatch.chdir(tmp_path)
    short, found = re.subn(r"(num_inference_steps=|\.table\()\d+", r"\g<1>2", block)
    assert found == 1
    exec(compile(short, "README.md", "exec"), {})
