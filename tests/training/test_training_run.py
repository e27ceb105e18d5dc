"""Whole runs of tiny models, from pictures to what they made."""

import io
import json
import re
import shutil
import signal
from contextlib import redirect_stderr, redirect_stdout

import drawn
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from sdjax import StableDiffusionPipeline
from sdjax.commands.main import main
from sdjax.training import log, record, train
from sdjax.training.checkpoints import NotWrittenError
from sdjax.training.data.examples import DataError
from sdjax.training.steps import NotFiniteError, Progress
from sdjax.training.stopping import Stopped

SMALL = {"resolution": 32, "enable_bucket": False, "train_batch_size": 1, "mixed_precision": "no"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return drawn.folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def whole(data, one_level_folder, tmp_path_factory):
    """(the result's path, the options, stdout, stderr) of a command that was let alone."""
    folder = tmp_path_factory.mktemp("whole")
    given = {"model": one_level_folder, "max_train_steps": 6, "checkpointing_steps": 2, "cache_dir": folder / "cache"}
    samples = {"validation_prompt": "a goose", "validation_steps": 3, "num_validation_images": 2}
    options = {**SMALL, **given, **samples, "random_flip": True, "proportion_empty_prompts": 0.3}
    texts = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if not isinstance(value, bool)]
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main(
            [
                "train",
                "lora",
                str(data),
                f"--out={folder / 'x.safetensors'}",
                "--no-enable-bucket",
                "--random-flip",
                *texts,
            ]
        )
    assert ended.value.code == 0
    return folder / "x.safetensors", options, out.getvalue(), err.getvalue()


def test_a_lora_is_trained_and_loads(whole, one_level_folder):
    path, _, out, err = whole
    assert out == f"{path}\n"
    assert "pictures encoded: 8 of 8\n" in err and "captions encoded: 5 of 5\n" in err
    assert re.search(r"^step 6 of 6, loss \d\.\d{4}, .* steps a second, 0 s left$", err, re.MULTILINE)
    assert max(float(np.abs(up).max()) for name, up in load_file(path).items() if name.endswith("lora_up.weight")) > 0
    pipe = StableDiffusionPipeline.from_pretrained(one_level_folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora(path)
    made = pipe("a goose", seed=range(2), num_images_per_prompt=2, num_inference_steps=30).images
    for seed, image in enumerate(made):
        with Image.open(path.with_name("x.training") / "samples" / f"000006-0-{seed}.png") as sample:
            assert np.abs(np.int16(image) - np.int16(sample)).max() <= 1


def test_a_run_leaves_a_log_a_curve_and_a_sheet(whole):
    folder = whole[0].with_name("x.training")
    assert [row["step"] for row in log.read(folder / "log.csv")] == [1, 2, 3, 4, 5, 6]
    with Image.open(folder / "loss.png") as curve:
        assert curve.size == (960, 480) and len(curve.getcolors(2**16)) > 5
    names = sorted(path.name for path in (folder / "samples").iterdir())
    assert names == [*(f"{step:06}-0-{seed}.png" for step in (3, 6) for seed in (0, 1)), "samples.png"]
    assert json.loads((folder / "run.json").read_text())["options"]["rank"] == 4


class Killed(Exception):
    pass


def test_a_run_that_ends_early_goes_on_bit_for_bit(whole, data, tmp_path):
    path, options, *_ = whole

    def dies(seen):
        if isinstance(seen, Progress) and seen.step == 5:
            raise Killed

    out = tmp_path / "x.safetensors"
    with pytest.raises(Killed):
        train("lora", data, out, on_progress=dies, **options)
    assert not out.exists()
    seen = []
    result = train("lora", data, out, on_progress=seen.append, **options)
    assert (result.out, result.folder, result.steps) == (out, tmp_path / "x.training", 2)
    assert result.loss == log.read(result.folder / "log.csv")[-1]["loss"]
    assert not any("encoded" in one for one in seen if isinstance(one, str))
    ours, theirs = load_file(out), load_file(path)
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert (result.folder / "log.csv").read_bytes() == path.with_name("x.training").joinpath("log.csv").read_bytes()


def test_a_folder_of_another_run_is_not_gone_on_with(whole, data, tmp_path):
    path, options, *_ = whole
    shutil.copytree(path.with_name("x.training"), tmp_path / "y.training")
    with pytest.raises(ValueError, match=r"is of another run: rank 4, not 8; give another --out"):
        train("lora", data, tmp_path / "y.safetensors", **{**options, "rank": 8})
    fewer = shutil.copytree(data, tmp_path / "fewer")
    (fewer / "0.txt").write_text("another caption")
    with pytest.raises(ValueError, match=r"is of another run: 4 pictures and captions that are not those of now"):
        train("lora", fewer, tmp_path / "y.safetensors", **options)


def test_a_folder_of_a_run_that_made_no_step_is_taken(whole, data, tmp_path):
    _, options, *_ = whole
    out = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="no checkpoint of step 7: there are none"):
        train("lora", data, out, **{**options, "rank": 8}, resume_from_checkpoint=7)
    record.check(tmp_path / "x.training", {"options": {"rank": 4}, "data": "other"})
    (tmp_path / "x.training" / "class").mkdir()
    (tmp_path / "x.training" / "class" / "a.png").touch()
    with pytest.raises(ValueError, match="is of another run: rank 8, not 4"):
        record.check(tmp_path / "x.training", {"options": {"rank": 4}, "data": "other"})


def test_two_runs_do_not_share_a_folder(tmp_path):
    with (
        record.held(tmp_path / "x", {"options": {}}),
        pytest.raises(BlockingIOError, match="another process is training there"),
        record.held(tmp_path / "x", {"options": {}}),
    ):
        pass
    with record.held(tmp_path / "x", {"options": {}}):
        pass


def test_samples_that_a_kill_prevented_are_drawn_when_the_run_goes_on(whole, data, tmp_path):
    path, options, *_ = whole
    before = path.with_name("x.training") / "samples"
    folder = shutil.copytree(before.parent, tmp_path / "x.training")
    (folder / "samples" / "000006-0-1.png").unlink()
    assert train("lora", data, tmp_path / "x.safetensors", **options).steps == 0
    for name in ("000006-0-1.png", "samples.png"):
        assert (folder / "samples" / name).read_bytes() == (
            path.with_name("x.training") / "samples" / name
        ).read_bytes()


def test_bad_data_is_listed_before_the_model_is_loaded(data, tmp_path):
    bad = shutil.copytree(data, tmp_path / "bad")
    drawn.picture(0, (3, 3)).save(bad / "tiny.png")
    with pytest.raises(DataError, match="1 without a caption, 1 too small"):
        train("lora", bad, tmp_path / "x.safetensors", model=tmp_path / "no model")
    assert {*tmp_path.iterdir()} == {bad}


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (
            NotFiniteError("the loss is nan", 7, 5),
            1,
            "error: the loss is nan at step 7: the checkpoint of step 5 is kept",
        ),
        (NotWrittenError("disk full"), 1, "error: disk full"),
        (Stopped(signal.SIGTERM, 7, 9, "x"), 143, "stopped by SIGTERM after step 7 of 9"),
    ],
)
def test_a_run_that_fails_is_one_line_and_a_status(data, tmp_path, capsys, monkeypatch, error, status, line):
    def fails(*_):
        raise error

    monkeypatch.setattr("sdjax.training.run.run", fails)
    with pytest.raises(SystemExit) as ended:
        main(["train", "lora", str(data), f"--out={tmp_path / 'x.safetensors'}"])
    assert ended.value.code == status
    [shown] = capsys.readouterr().err.splitlines()
    assert shown.startswith(line)
