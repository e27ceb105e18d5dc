"""Jobs whose process is killed, or told to stop, by a signal: real processes and a tiny model."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from processes_of_a_job import ENVIRONMENT, begin, parts

import sdjax

ROOT = Path(sdjax.__file__).parents[1]
KILLS = 3  # scripts/bench/kill.py, by itself, has 30
LONG = ["--prompt", "goose", "--seeds", "0:2000", "--steps", "20"]
PATIENCE = 120.0
SOON = 20.0  # on an idle machine half of that


def stopped(process: subprocess.Popen, signum: int) -> tuple[str, float]:
    """What it says when this signal comes, and how long it takes to end."""
    start = time.monotonic()
    process.send_signal(signum)
    _, said = process.communicate(timeout=PATIENCE)
    return said, time.monotonic() - start


def wait_for(out: Path, pattern: str, count: int = 1) -> None:
    until = time.monotonic() + PATIENCE
    while len(list(out.glob(pattern))) < count:
        assert time.monotonic() < until, f"no {pattern}"
        time.sleep(0.02)


def test_sigkill_at_random_moments(one_level_folder, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "kill.py"), "--kills", str(KILLS), "--seed", "1"]
    done = subprocess.run([*command, "--model", one_level_folder], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    counts = [int(line.split()[-2]) for line in done.stdout.splitlines() if line.startswith("job ")]
    assert sum(counts) == KILLS


def test_a_stopped_job_says_how_to_go_on_and_does(one_level_folder, tmp_path):
    """Whichever signal stops it, what is there is whole chunks; the next run keeps them and adds to them."""
    out, made = tmp_path / "out", 0
    for signum in (signal.SIGTERM, signal.SIGINT):
        process = begin(one_level_folder, out, "--quiet", job=LONG)
        wait_for(out, "manifest/*.parquet", made // 2 + 1)
        said, seconds = stopped(process, signum)
        assert process.returncode == 128 + signum
        assert seconds < SOON
        before, made = made, len(list(out.glob("images/*/*")))
        assert before < made < 2000 and made == 2 * len(parts(out))
        assert f"stopped by {signum.name}: {made:,} of 2,000 pictures are at" in said and "the same command" in said
        assert not list(out.glob(".sdjax*"))


def test_told_to_stop_while_it_compiles(one_level_folder, tmp_path):
    """The compiler cannot be interrupted; the process ends all the same."""
    cold = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    process = begin(one_level_folder, tmp_path / "out", "--quiet", job=LONG, **cold)
    wait_for(tmp_path / "out", ".sdjax-lock.json")
    time.sleep(0.5)
    said, seconds = stopped(process, signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM
    assert seconds < SOON
    assert re.search("stopped by SIGTERM: [024] of 2,000 pictures", said)  # what it could still sample in that time
    assert not list((tmp_path / "out").glob(".sdjax*"))
