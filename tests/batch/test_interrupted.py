"""Jobs whose process is killed, or told to stop, by a signal: real processes and the embedded model."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sdjax

ROOT = Path(sdjax.__file__).parents[1]
COMMAND = [
    sys.executable,
    "-m",
    "sdjax",
    "batch",
    "--prompt",
    "a goose",
    "--quiet",
]
KILLS = 5  # scripts/bench/kill.py, by itself, has 30
PATIENCE = 120.0
SOON = 20.0  # on an idle machine half of that


def begin(out: Path, *options: str, **environment: str) -> subprocess.Popen:
    command = [*COMMAND, "--out", str(out), *options]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", **environment}
    return subprocess.Popen(command, env=os.environ | flags, stderr=subprocess.PIPE, text=True)


def wait_for(out: Path, pattern: str) -> None:
    until = time.monotonic() + PATIENCE
    while not list(out.glob(pattern)):
        assert time.monotonic() < until, f"no {pattern}"
        time.sleep(0.02)


def told_to_stop(process: subprocess.Popen, signum: int) -> tuple[str, float]:
    """What it says, and how long it takes to end."""
    start = time.monotonic()
    process.send_signal(signum)
    _, said = process.communicate(timeout=PATIENCE)
    return said, time.monotonic() - start


def pictures(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("images/*/*")}


def test_sigkill_at_random_moments():
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "kill.py"), "--kills", str(KILLS), "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    counts = [int(line.split()[-2]) for line in done.stdout.splitlines() if line.startswith("job ")]
    assert sum(counts) == KILLS


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_says_how_to_go_on(signum, tmp_path):
    options = ["--seeds", "0:64", "--steps", "20", "--batch", "2", "--chunk-size", "4"]
    process = begin(tmp_path / "out", *options)
    wait_for(tmp_path / "out", "manifest/*.parquet")
    said, seconds = told_to_stop(process, signum)
    assert process.returncode == 128 + signum
    assert seconds < SOON
    made = len(pictures(tmp_path / "out"))
    assert 0 < made < 64 and made % 4 == 0
    assert f"stopped by {signum.name}: {made} of 64 pictures are at" in said and "the same command" in said
    assert not list((tmp_path / "out").glob(".sdjax*"))
    if signum == signal.SIGTERM:  # what is there does not depend on the signal
        again = begin(tmp_path / "out", *options)
        _, said = again.communicate(timeout=PATIENCE)
        assert again.returncode == 0, said
        assert len(pictures(tmp_path / "out")) == 64


def test_told_to_stop_while_it_compiles(tmp_path):
    """The compiler cannot be interrupted; the process ends all the same."""
    options = ["--seeds", "0:256", "--steps", "50", "--batch", "2"]
    process = begin(tmp_path / "out", *options, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache"))
    wait_for(tmp_path / "out", ".sdjax-lock.json")
    time.sleep(0.5)
    said, seconds = told_to_stop(process, signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM
    assert seconds < SOON
    assert "stopped by SIGTERM: 0 of 256 pictures" in said
    assert not list((tmp_path / "out").glob(".sdjax*"))
