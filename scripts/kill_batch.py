"""Kills a job with SIGKILL at random moments until it is through: `python scripts/kill_batch.py --kills 30 --seed 0`.

The job is sampled with the embedded model, each attempt in a process of its own, killed at a moment drawn evenly from
its start to a second after its first pictures. When an attempt gets through, the output must be that of an undisturbed
run, byte for byte; another job begins if there are kills left. Exit status 1 where it is not.
"""

import argparse
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

JOB = ["--prompt=a goose on a blue background", "--prompt=a red apple", "--steps=2", "--batch=2", "--chunk-size=8"]
SEEDS_A_KILL = 4  # an attempt gets so far, roughly
BEYOND_SECONDS = 1.0  # after the first pictures of an attempt


def main() -> None:
    """Prints a line for each job that got through."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--format", default="files")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # before any device is used
    draw, options = random.Random(given.seed), ["--quiet", f"--format={given.format}"]
    seeds = f"--seeds=0:{SEEDS_A_KILL * given.kills}"
    with tempfile.TemporaryDirectory() as folder:
        whole, out = Path(folder, "whole"), Path(folder, "out")
        finish(begin(Path(folder, "compiled"), ["--seeds=0", *options]))
        start = time.perf_counter()
        process = begin(whole, [seeds, *options])
        while not list(whole.glob("manifest/*.parquet")):
            time.sleep(0.01)
        first = time.perf_counter() - start
        finish(process)
        seconds = time.perf_counter() - start
        print(f"undisturbed: {len(files(whole))} files in {seconds:.1f} s, the first after {first:.1f} s", flush=True)
        kills = 0
        for job in itertools.count(1):
            before = kills
            while attempt(
                out, [seeds, *options], draw.uniform(0, first + BEYOND_SECONDS) if kills < given.kills else None
            ):
                kills += 1
            compare(whole, out)
            print(f"job {job}: the same bytes after {kills - before} kills", flush=True)
            if kills == given.kills:
                return
            shutil.rmtree(out)


def attempt(out: Path, options: list[str], seconds: float | None) -> bool:
    """Whether it was killed after these seconds; otherwise it got through."""
    process = begin(out, options)
    if seconds is None:
        finish(process)
        return False
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        return True
    check(status)
    return False


def begin(out: Path, options: list[str]) -> int:
    """The process id of an attempt. A fork of this process, which has imported what the command does, saves seconds."""
    import sdjax.batch.runner  # noqa: F401
    from sdjax.commands.main import main

    process = os.fork()
    if process == 0:
        warnings.simplefilter("ignore")  # that a dead lock is taken over
        try:
            main(["batch", *JOB, *options, "--out", str(out)])
        except SystemExit as end:
            os._exit(end.code or 0)  # what this process was about to do at its end is not the fork's
    return process


def finish(process: int) -> None:
    check(os.waitpid(process, 0)[1])


def check(status: int) -> None:
    if code := os.waitstatus_to_exitcode(status):
        sys.exit(f"an attempt failed with {code}")


def files(folder: Path) -> dict[str, object]:
    """{name: content} of all files; the seconds that a picture took are left out of the manifest."""
    from sdjax.batch import manifest

    found: dict[str, object] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, data = str(path.relative_to(folder)), path.read_bytes()
        if name.startswith(manifest.FOLDER):
            data = [{k: v for k, v in row.items() if k not in manifest.VARYING} for row in manifest.load(data)]
        found[name] = data
    return found


def compare(whole: Path, out: Path) -> None:
    expected, found = files(whole), files(out)
    if wrong := [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]:
        sys.exit(f"{len(wrong)} files differ: {', '.join(sorted(wrong)[:5])}")


if __name__ == "__main__":
    main()
