"""A ControlNet for a tiny model: from drawings to a folder that both libraries read."""

import sys

import controlnet
import controls
import following
import jax
import numpy as np
import oracle
import pytest
import recipe
from drawings import Drawings
from PIL import Image

from sdjax.models import ControlNetModel

SMALL = {
    "SIZE": 32,
    "CONTROL_ROUNDS": 1,
    "CONTROLNET": {
        "down_block_types": ("DownBlock2D",) * 2,
        "mid_block_type": "UNetMidBlock2D",
        "conditioning_embedding_out_channels": (4, 6, 8),
    },
}


@pytest.fixture(scope="module")
def command(sd1_folder, tmp_path_factory):
    """Runs a stage, with small sizes."""
    work, out = (tmp_path_factory.mktemp(name) for name in ("work", "out"))
    fixed = [f"--work={work}", f"--out={out}", f"--model={sd1_folder}", "--steps=2", "--batch=2", "--rate=0.1"]

    def command(stage):
        monkeypatch.setattr(sys, "argv", ["controlnet.py", stage, *fixed])
        controlnet.main()
        return work, out

    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in SMALL.items():
            monkeypatch.setattr(recipe, name, value)
        monkeypatch.setattr(controls, "BATCH", 2)
        monkeypatch.setattr(following, "SHOWN", slice(1))
        rgba = np.zeros((3, 40, 40, 4), np.uint8)
        rgba[:, 10:30, 10:30] = (200, 0, 0, 255)
        Drawings(["goose", "duck", "sheep"], rgba).save(work / "drawings.npz")  # the last is one that it never sees
        jax.config.update("jax_disable_most_optimizations", True)  # programs run twice are not worth compiling well
        yield command
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def trained(command):
    """The folders of a training of two steps: what it learned from, and what came of it."""
    return command("all")


def test_what_it_learns_from(trained):
    work, _ = trained
    pool = controls.Controls.load(work / "controls")
    assert pool.latents.shape == (2, 8, 8, 4)
    assert pool.edges.shape == (2, 32, 4)
    assert np.unpackbits(pool.edges).any()
    assert [controls.is_unseen(name) for name in ("goose", "duck", "sheep")] == [False, False, True]
    assert len(pool.input_ids) == 2


def test_both_libraries_read_it(trained):
    import diffusers
    import torch

    _, out = trained
    ours = ControlNetModel.from_pretrained(out)
    theirs = diffusers.ControlNetModel.from_pretrained(out, torch_dtype=torch.float32)
    assert theirs.config.mid_block_type == "UNetMidBlock2D"
    x, edges, texts = oracle.normal(1, 8, 8, 4), np.zeros((1, 32, 32, 3), np.float32), oracle.normal(1, 7, 24)
    edges[:, 8:24, 8] = 1
    residuals = oracle.run(ours, x, np.float32([500]), texts, picture=ours.embed_picture(edges))
    with torch.no_grad():
        down, middle = theirs(
            oracle.nchw(x), torch.tensor([500]), torch.from_numpy(texts), oracle.nchw(edges), return_dict=False
        )
    for own, expected in zip(residuals, [*down, middle], strict=True):
        assert np.abs(own).max() > 0  # two steps have moved what began with zero
        oracle.assert_close(own, oracle.nhwc(expected))


def test_how_well_pictures_keep_to_edges(trained, command, capsys, monkeypatch):
    """A row for each kind of prompt and weight, and a sheet."""
    work, _ = trained
    monkeypatch.setattr(following, "STEPS", 2)
    command("measure")
    rows = [line.strip("| ").split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1].strip() for row in rows] == ["0", "1"] * 3 + [""]
    assert all(0 <= float(row[2]) <= float(row[3]) <= 1 for row in rows)
    command("sheet")
    with Image.open(work / "sheet.png") as sheet:
        assert sheet.size == ((1 + 3) * 32, (4 + 2 * len(following.PROMPTS)) * 32)
