"""Kills a job with SIGKILL at random moments until it is through: `python scripts/bench/kill.py --kills 30 --seed 0`.

The job is sampled with the embedded model or another, each attempt in a process of its own, killed at a moment drawn
evenly from its start to a second after its first pictures. When an attempt gets through, the output must be that of an
undisturbed run, byte for byte; another job begins if there are kills left. Exit status 1 where it is not.
"""

import argparse
import itertools
import multiprocessing
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

Process = multiprocessing.process.BaseProcess


def main() -> None:
    """Prints a line for each job that got through."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--format", default="files")
    parser.add_argument("--model", help="another than the embedded one")
    given = parser.parse_args()
    draw, options = random.Random(given.seed), ["--quiet", f"--format={given.format}"]
    options += [f"--model={given.model}"] if given.model else []
    job = [f"--seeds=0:{SEEDS_A_KILL * given.kills}", *options]
    with tempfile.TemporaryDirectory() as folder:
        whole, out = Path(folder, "whole"), Path(folder, "out")
        survives(begin(Path(folder, "compiled"), ["--seeds=0", *options]))
        start, process = time.perf_counter(), begin(whole, job)
        while not list(whole.glob("manifest/*.parquet")):
            time.sleep(0.01)
        first = time.perf_counter() - start
        survives(process)
        expected, seconds = files(whole), time.perf_counter() - start
        print(f"undisturbed: {len(expected)} files in {seconds:.1f} s, the first after {first:.1f} s", flush=True)
        kills = 0
        for number in itertools.count(1):
            before = kills
            while not survives(
                begin(out, job), draw.uniform(0, first + BEYOND_SECONDS) if kills < given.kills else None
            ):
                kills += 1
            found = files(out)
            if wrong := [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]:
                sys.exit(f"{len(wrong)} files differ: {', '.join(sorted(wrong)[:5])}")
            print(f"job {number}: the same bytes after {kills - before} kills", flush=True)
            if kills == given.kills:
                return
            shutil.rmtree(out)


def begin(out: Path, options: list[str]) -> Process:
    """An attempt. A fork of this process, which has imported what the command does, saves seconds."""
    import sdjax.batch.runner  # noqa: F401

    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # no device is used here
    process = multiprocessing.get_context("fork").Process(target=sample, args=([*JOB, *options, f"--out={out}"],))
    process.start()
    return process


def sample(options: list[str]) -> None:
    from sdjax.commands.main import main

    warnings.simplefilter("ignore")  # that a dead lock is taken over
    main(["batch", *options])


def survives(process: Process, seconds: float | None = None) -> bool:
    """Whether an attempt gets through before it is killed after these seconds. Exits if it fails by itself."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        sys.exit(f"an attempt failed with {process.exitcode}")
    return process.exitcode == 0


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


if __name__ == "__main__":
    main()
