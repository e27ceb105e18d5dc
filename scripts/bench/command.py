"""Where a start of the command goes: `python scripts/bench/command.py`, or with `--full-size`.

Each run is a process of its own. Prints its wall-clock and CPU seconds, how many programs were compiled and how many
came from the disk cache, and the wall-clock seconds of its parts:

import      JAX, Flax and sdjax
load        the checkpoint, from its files to the devices
trace       Python to jaxprs, of the programs
lower       jaxprs to StableHLO
compile     by XLA, or read from the disk cache
rest        of the first call: the picture itself; then saving it

--full-size: Stable Diffusion 1.5 with random weights, one step of 512x512; needs 2 GB of the temporary folder and 7 GB
of memory. --tiny: the first two runs, of two steps. Exit status 1 if a run that should compile nothing compiles.
"""

import argparse
import os
import sys
import tempfile
import time
from typing import Any, NamedTuple

from processes import Worker
from run import random_weights
from table import markdown


class Run(NamedTuple):
    """A picture, or several, made by a process of its own."""

    name: str
    arguments: list[str]
    is_warm: bool
    """whether all its programs were compiled before"""


RUNS = (
    Run("one picture, nothing cached", ["--seeds", "0"], False),
    Run("one picture", ["--seeds", "1"], True),
    Run("another prompt and sampler", ["--seeds", "2", "--sampler", "euler", "--negative", "red"], True),
    Run("sixteen seeds, not yet compiled", ["--seeds", "0:16"], False),
    Run("sixteen seeds", ["--seeds", "16:32"], True),
)
PARTS = ("import", "load", "trace", "lower", "compile", "rest")
EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}
CACHE_HIT = "/jax/compilation_cache/cache_hits"


def measured(arguments: list[str]) -> dict[str, float]:
    """Runs the command in this process: seconds of each part, programs asked for ("programs") and those cached."""
    start = time.perf_counter()
    import jax

    from sdjax.pipeline import StableDiffusionPipeline

    found = dict.fromkeys((*PARTS, "programs", "cached"), 0.0) | {"import": time.perf_counter() - start}

    def duration(event: str, seconds: float, **_: Any) -> None:
        if event in EVENTS:
            found[EVENTS[event]] += seconds
            found["programs"] += EVENTS[event] == "compile"

    def event(name: str, **_: Any) -> None:
        found["cached"] += name == CACHE_HIT

    load = StableDiffusionPipeline.from_pretrained

    def timed_load(*args: Any, **options: Any) -> StableDiffusionPipeline:
        begun = time.perf_counter()
        pipe = load(*args, **options)
        found["load"] = time.perf_counter() - begun
        found["trace"] = 0.0  # that of the load, which makes the models' shapes
        return pipe

    jax.monitoring.register_event_duration_secs_listener(duration)
    jax.monitoring.register_event_listener(event)
    StableDiffusionPipeline.from_pretrained = timed_load
    from sdjax.commands.main import main

    try:
        main(arguments)
    except SystemExit as status:
        if status.code:
            raise RuntimeError(f"sdjax {' '.join(arguments)}: exit status {status.code}") from status
    found["rest"] = time.perf_counter() - start - sum(found[part] for part in PARTS[:-1])
    return found


def run(arguments: list[str], folder: str) -> dict[str, float]:
    """`measured` in a process of its own, with its wall-clock and CPU seconds. Pictures go to the folder."""
    start, before = time.perf_counter(), os.times()
    with Worker(JAX_COMPILATION_CACHE_DIR=f"{folder}/cache") as worker:
        found = worker.call("command:measured", arguments=["generate", "a goose on a blue background", *arguments])
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall": time.perf_counter() - start, "CPU": cpu} | found.value


def main() -> int:
    """Prints a line a run; 0 if nothing is compiled twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full-size", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    runs, options = RUNS[: 2 if given.full_size or given.tiny else None], ["--steps", "2"] if given.tiny else []
    if given.full_size:
        options = ["--model", random_weights("sd15"), "--steps", "1"]
    columns, rows, failed = ("wall", "CPU", *PARTS), [], False
    with tempfile.TemporaryDirectory() as folder:
        for name, arguments, is_warm in runs:
            found = run([*arguments, *options, "--out", folder], folder)
            compiled, cached = int(found["programs"] - found["cached"]), int(found["cached"])
            failed |= is_warm and compiled > 0
            rows.append([name, compiled, cached, *(f"{found[column]:.2f}" for column in columns)])
    print(markdown(["", "compiled", "cached", *columns], rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
