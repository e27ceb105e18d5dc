"""Runs that end early in every way, and go on bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
import toy_run
from PIL import Image
from toy_run import STEPS, Toy, run

from sdjax.training import log, plot
from sdjax.training.checkpoints import Checkpoints, NotWrittenError
from sdjax.training.steps import NotFiniteError, Progress
from sdjax.training.stopping import Stop, Stopped


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder, and the last state, of a run that was let alone."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


def kept(folder):
    checkpoints = Checkpoints(folder / "checkpoints", toy_run.LIMIT)
    try:
        return checkpoints.steps
    finally:
        checkpoints.close()


def same(whole, folder, state):
    jax.tree.map(np.testing.assert_array_equal, state, whole[1])
    assert (folder / "log.csv").read_bytes() == (whole[0] / "log.csv").read_bytes()


def test_a_run_logs_each_step_and_keeps_the_last_checkpoints(whole):
    folder, state = whole
    rows = log.read(folder / "log.csv")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1].keys() == {"step", "loss", "grad_norm"}
    assert kept(folder) == [55, 60] and int(state["step"]) == STEPS
    assert state["half"].dtype == jnp.bfloat16


def test_progress_and_what_is_done_between_steps(tmp_path):
    seen, validated = [], []
    run(
        tmp_path,
        total=7,
        on_progress=seen.append,
        validate=lambda step, state: validated.append((step, int(state["step"]))),
        validation_steps=3,
    )
    assert [progress.step for progress in seen] == list(range(1, 8))
    assert validated == [(3, 3), (6, 6), (7, 7)]
    assert Progress(4, 10, 0.5, 2.0).seconds_left == 3 and Progress(4, 10, 0.5, None).seconds_left is None


def test_a_run_that_is_over_does_nothing(whole):
    folder, state = whole
    jax.tree.map(np.testing.assert_array_equal, run(folder, validate=pytest.fail), state)


def test_a_run_goes_on_from_the_step_that_is_wanted(whole, tmp_path):
    run(tmp_path, total=33)
    assert kept(tmp_path) == [30, 33]
    with pytest.raises(ValueError, match="no checkpoint of step 20: 30, 33"):
        run(tmp_path, wanted=20)
    same(whole, tmp_path, run(tmp_path, wanted=30))
    same(whole, tmp_path, run(tmp_path, wanted=0))


@pytest.mark.parametrize("what", ["loss", "weight"])
def test_what_is_not_finite_stops_the_run_with_its_step(whole, tmp_path, what):
    breaks = {"loss": None, "weight": lambda state, loss: ({**state, "w": state["w"] / 0}, loss)}[what]
    with pytest.raises(NotFiniteError, match=r"step \d+: the checkpoint of step 15 is kept") as error:
        run(tmp_path, toy=Toy(17, breaks))
    assert error.value.kept == 15 and error.value.step in ((17,) if what == "loss" else (18, 20))
    assert kept(tmp_path) == [10, 15]
    same(whole, tmp_path, run(tmp_path))


def test_a_request_to_stop_is_heard_after_the_step(whole, tmp_path):
    stop = Stop()

    def progress(seen):
        if seen.step == 22:
            stop.signum = signal.SIGTERM

    with pytest.raises(Stopped, match=r"stopped by SIGTERM after step 2[34] of 60"):
        run(tmp_path, on_progress=progress, stop=stop)
    assert kept(tmp_path)[-1] in (23, 24)
    same(whole, tmp_path, run(tmp_path))


def test_a_checkpoint_that_does_not_fit_leaves_those_before(whole, tmp_path, monkeypatch):
    save = orbax.checkpoint.CheckpointManager.save

    def full(self, step, **options):
        if step == 20:
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device")
        return save(self, step, **options)

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", full)
    with pytest.raises(NotWrittenError, match=r"step 20 could not be written, the last one is of step 15: RESOURCE"):
        run(tmp_path)
    monkeypatch.undo()
    assert kept(tmp_path) == [10, 15]
    same(whole, tmp_path, run(tmp_path))


def test_room_for_checkpoints_is_asked_for_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=10))
    with pytest.raises(NotWrittenError, match=r"bytes are needed for 2 checkpoints and the next, and 10 are free"):
        run(tmp_path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in orbax, of what it was still reading
def test_a_damaged_checkpoint_is_named(tmp_path):
    run(tmp_path, total=10)
    for path in (tmp_path / "checkpoints" / "10" / "state").rglob("*"):
        if path.is_file() and path.name not in ("commit_success.txt", "_METADATA"):
            path.write_bytes(b"")
    with pytest.raises(ValueError, match="the checkpoint of step 10 cannot be read"):
        run(tmp_path)


def process(folder):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, toy_run.__file__, str(folder)], env=environment, stderr=subprocess.PIPE)


def wait_for_steps(folder, count):
    deadline = time.monotonic() + 60
    while len(log.read(folder / "log.csv")) < count and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_run_that_is_killed_at_random_moments_is_the_same_bit_for_bit(whole, tmp_path):
    chance, steps_there = random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID")), 0
    for _ in range(3):
        with process(tmp_path) as running:
            wait_for_steps(tmp_path, steps_there + 1)
            time.sleep(chance.uniform(0, 0.4))
            running.kill()
        steps_there = len(log.read(tmp_path / "log.csv"))
    assert 0 < steps_there < STEPS
    same(whole, tmp_path, run(tmp_path))


def test_sigterm_leaves_a_checkpoint_of_the_step(whole, tmp_path):
    with process(tmp_path) as running:
        wait_for_steps(tmp_path, 7)
        running.terminate()
        message = running.stderr.read().decode()
    assert running.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step" in message and "the same command goes on" in message
    assert kept(tmp_path)[-1] == len(log.read(tmp_path / "log.csv"))
    same(whole, tmp_path, run(tmp_path))


def test_a_log_is_cut_where_a_run_goes_on(tmp_path):
    path: Path = tmp_path / "log.csv"
    with log.Log(path) as own:
        for step in (1, 2, 3):
            own.write(step, {"loss": step / 3})
    with path.open("a") as file:
        file.write("4")
    with log.Log(path, 2) as own:
        own.write(3, {"loss": 0.5})
    assert log.read(path) == [{"step": 1, "loss": 1 / 3}, {"step": 2, "loss": 2 / 3}, {"step": 3, "loss": 0.5}]


def test_a_log_is_also_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    with log.Log(tmp_path / "log.csv", tensorboard=tmp_path / "events") as own:
        own.write(1, {"loss": 0.5})
        own.write_picture(1, "samples", Image.new("RGB", (8, 8)))
    [events] = (tmp_path / "events").iterdir()
    assert b"loss" in events.read_bytes() and b"samples" in events.read_bytes()


def test_ticks_are_round_and_curves_are_smoothed():
    assert plot.ticks(1.0) == [0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]
    assert plot.ticks(37) == [0, 10, 20, 30]
    assert plot.smoothed([1.0] * 40).tolist() == [1.0] * 40
    assert plot.smoothed([*[0.0] * 39, 1.0])[-1] == 0.5
    assert plot.curve([1], [0.0], "a").size == (plot.WIDTH, plot.HEIGHT)
