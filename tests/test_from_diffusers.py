"""What docs/from-diffusers.md writes for PyTorch diffusers and for sdjax makes the same pictures."""

import re
from pathlib import Path

import numpy as np
import pytest

from sdjax.request.elsewhere import CALLED

PAGE = (Path(__file__).parents[1] / "docs" / "from-diffusers.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
MODEL = "CompVis/stable-diffusion-v1-4"


def run(blocks: list[str], folder: Path) -> dict:
    variables = {}
    for block in blocks:
        exec(compile(block.replace(MODEL, str(folder)), "from-diffusers.md", "exec"), variables)
    return variables


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers
@pytest.mark.parametrize("part", [slice(0, 2), slice(2, None)], ids=["pipeline", "by-hand"])
def test_both_sides_make_the_same_picture(part, one_level_folder):
    imports = "import torch\n"
    expected = run([imports, *BLOCKS[part][::2]], one_level_folder)
    ours = run(BLOCKS[part][1::2], one_level_folder)
    images = [np.asarray(side["image"], np.int16) for side in (expected, ours)]
    assert np.ptp(images[0]) > 50
    assert np.abs(images[0] - images[1]).max() <= 1
    if "latents" in ours:
        latents = expected["latents"].numpy().transpose(0, 2, 3, 1)
        assert np.abs(ours["latents"] - latents).max() < 1e-4 * np.abs(latents).max()


def test_names_are_those_of_the_answers():
    names = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|$", PAGE, re.MULTILINE))
    assert len(names) == 18
    assert all(CALLED[theirs].startswith(ours) for theirs, ours in names.items())
