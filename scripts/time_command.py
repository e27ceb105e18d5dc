"""Where a start of the command goes: `python scripts/time_command.py`, or with `--full-size`.

Each run is a process of its own. Prints its wall-clock and CPU seconds, how many programs were compiled and how many
came from the disk cache, and the wall-clock seconds of its parts:

import      JAX, Flax and sdjax
load        the checkpoint, from its files to the devices
trace       Python to jaxprs, of the programs
lower       jaxprs to StableHLO
compile     by XLA, or read from the disk cache
rest        of the first call: the picture itself; then saving it

--full-size: Stable Diffusion 1.5 with random weights, one step of 512x512; needs 2 GB of the temporary folder and 7 GB
of memory. Exit status 1 if a run that should compile nothing compiles.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple


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
            found["programs"] += event.endswith("backend_compile_duration")

    def event(name: str, **_: Any) -> None:
        found["cached"] += name == CACHE_HIT

    load = StableDiffusionPipeline.from_pretrained

    def timed_load(*args: Any, **options: Any) -> StableDiffusionPipeline:
        start = time.perf_counter()
        pipe = load(*args, **options)
        found["load"] = time.perf_counter() - start
        found["trace"] = 0.0  # that of the load, which makes the models' shapes
        return pipe

    jax.monitoring.register_event_duration_secs_listener(duration)
    jax.monitoring.register_event_listener(event)
    StableDiffusionPipeline.from_pretrained = timed_load
    from sdjax.commands.main import main

    try:
        main(arguments)
    except SystemExit as status:
        assert not status.code, status
    found["rest"] = time.perf_counter() - start - sum(found[part] for part in PARTS[:-1])
    return found


def run(arguments: list[str], folder: Path) -> dict[str, float]:
    """`measured` in a process of its own, with its wall-clock and CPU seconds."""
    report, environment = folder / "report.json", os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, __file__, "--report", str(report), "generate", "a goose on a blue background"]
    start, before = time.perf_counter(), os.times()
    subprocess.run([*command, *arguments], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall": time.perf_counter() - start, "CPU": cpu} | json.loads(report.read_text())


def main() -> int:
    """Prints a line a run; 0 if nothing is compiled twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full-size", action="store_true")
    full_size, runs, model = parser.parse_args().full_size, RUNS, []
    columns = ("wall", "CPU", *PARTS)
    print(f"{'':<33}{'compiled':>9}{'cached':>8}" + "".join(f"{column:>9}" for column in columns))
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        if full_size:
            from full_size import SD15, write_pipeline

            write_pipeline(SD15, Path(folder) / "model")
            runs, model = RUNS[:2], ["--model", str(Path(folder) / "model"), "--steps", "1"]
        for name, arguments, is_warm in runs:
            found = run([*arguments, *model], Path(folder))
            compiled, cached = int(found["programs"] - found["cached"]), int(found["cached"])
            failed |= is_warm and compiled > 0
            print(f"{name:<33}{compiled:>9}{cached:>8}" + "".join(f"{found[c]:>9.2f}" for c in columns), flush=True)
    return int(failed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--report"]:
        Path(sys.argv[2]).write_text(json.dumps(measured(sys.argv[3:]), allow_nan=False))
        sys.exit()
    sys.exit(main())
