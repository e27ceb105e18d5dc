"""sdjax against PyTorch diffusers, on the same random full-size weights of Stable Diffusion 1.5.

    python scripts/bench/run.py --out bench.json                      two CPU cores: half an hour, 24 GB of memory
    python scripts/bench/run.py --out bench.json --only unet --dtypes bfloat16     that part again
    python scripts/bench/run.py --tiny                                a tiny model, no torch.compile: a rehearsal
    python scripts/bench/run.py --peer flax-0.35 --peer-python .../bin/python      also the deleted Flax UNet
    python scripts/bench/run.py --device gpu --out gpu.json --cache compiled       again: from compiled programs
    python scripts/bench/run.py --device tpu --sides sdjax --out tpu.json          without PyTorch

Stages: products of large matrices; the text encoder, 77 tokens; one UNet call, batch 2, 64x64 latents; the VAE's
decoding to 512x512; whole pictures with guidance, DDIM: one of 4 steps on a CPU; one and eight of 50 steps elsewhere.
Sides: sdjax; pytorch: eager, in the faster of two memory layouts, which are tried first; torch.compile, in that layout,
on a GPU with CUDA graphs (mode reduce-overhead).

Each side is a process, started once for each dtype: it loads all weights, compiles, warms up, and computes when it is
its turn; calls of the sides take turns. Every result is held against PyTorch's: a side that is wrong ends the run.
Prints Markdown; --out also keeps everything as JSON, stage by stage, and replaces what is measured again. Peak memory
is that of the process while it computes (on a GPU the framework's; sdjax's since its start). "of matrix rate": the
operations of the networks' products, by the time, by the best rate of a product of large matrices in the same run.

The weights are written once, 2 GB, to the folder sdjax-bench of the temporary folder. Needs Linux and the extra `test`.

A machine with NVIDIA GPUs but no network: where there is a network, with the same Python and architecture,
    pip wheel --wheel-dir wheels ".[cuda,test]"
then carry wheels/ and scripts/ over; there
    pip install --no-index --find-links wheels "sdjax[cuda,test]"
    python scripts/bench/run.py --device gpu --out gpu.json
The driver must be one for CUDA 13; torch.compile needs a C compiler. Nothing is downloaded. One device is used.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from processes import Worker
from sides import REFERENCE, SIDES
from stages import LIMITS, STAGES, Stage, error
from table import Cell, Results, tables

DTYPES = {"cpu": ["float32", "bfloat16"], "gpu": ["bfloat16"], "tpu": ["bfloat16"]}
TINY_SIDES = {"sdjax", "pytorch"}
IDLE_LIMIT = 0.02  # cores that a side may use while it waits
PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}


def environment(device: str, cache: Path | None = None) -> dict[str, str]:
    """The variables of a side's process: its device, nothing downloaded, programs kept in `cache` or compiled anew."""
    kept = {"JAX_COMPILATION_CACHE_DIR": f"{cache}/jax", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
    anew = {"JAX_ENABLE_COMPILATION_CACHE": "false", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "HF_HUB_OFFLINE": "1"}
    return {"JAX_PLATFORMS": PLATFORMS[device], **shared, **(kept if cache else anew)}


@contextlib.contextmanager
def started(
    pythons: Mapping[str, str], folder: str, dtype: str, device: str, cache: Path | None, run: dict[str, Any]
) -> Iterator[dict[str, Worker]]:
    """The sides, each in a process of its Python, with the weights loaded; what they are goes into `run`."""
    with contextlib.ExitStack() as stack:
        workers = {}
        for side, python in pythons.items():
            workers[side] = worker = stack.enter_context(Worker(python, **environment(device, cache)))
            about = worker.call("sides:running.start", side=side, dtype=dtype, device=device).value
            load = worker.call("sides:running.load", folder=folder).seconds
            run["sides"][side] = about | {"load": load}
            say(f"{side}: weights loaded in {load:.1f} s")
        yield workers
        idle = {side: worker.idle_cores for side, worker in workers.items()}
    run["idle_cores"][dtype] = idle
    for side in (side for side, cores in idle.items() if cores > IDLE_LIMIT):
        say(f"{side} used {idle[side]:.2f} cores while it waited: the figures of the others are too high")


def measure(workers: Mapping[str, Worker], name: str, stage: Stage, dtype: str) -> Cell:
    """A stage, the sides taking turns. Raises ArithmeticError if a result is not PyTorch's."""
    able = {side: worker for side, worker in workers.items() if stage.what in (SIDES[side].stages or (stage.what,))}
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files, layouts = {side: f"{folder}/{side}.npy" for side in able}, {}
        for side in sorted(able, key=lambda side: side != REFERENCE):  # it chooses the layouts
            options = {"stage": asdict(stage), "out": files[side], "layouts": layouts}
            found[side] = able[side].call("sides:running.prepare", **options).value
            layouts = found[side]["layouts"] if side == REFERENCE else layouts
            say(f"{side}: {name}, first call {found[side]['first']:.2f} s")
        results = {side: np.load(file) for side, file in files.items()}
    errors = {side: error(result, results[REFERENCE]) for side, result in results.items() if REFERENCE in results}
    if wrong := {side: value for side, value in errors.items() if not value <= LIMITS[dtype]}:
        raise ArithmeticError(f"{name} in {dtype}: not PyTorch's result, error / max |reference| is {wrong}")
    calls: dict[str, list[dict[str, Any]]] = {side: [] for side in able}
    for _ in range(stage.rounds):
        for side, worker in able.items():
            reply = worker.call("sides:running.measure")
            peak = reply.value["device_peak"] or reply.peak
            calls[side].append({"seconds": reply.value["seconds"], "peak": peak, "before": reply.before})
    return {
        "flops": found.get(REFERENCE, {"flops": None})["flops"],
        "sides": {
            side: found[side]
            | {"seconds": [call["seconds"] for call in calls[side]], "peak": max(call["peak"] for call in calls[side])}
            | {"before": min(call["before"] for call in calls[side]), "error": errors.get(side)}
            for side in able
        },
    }


class Record:
    """The results as a JSON file, written after every stage: what is measured again is replaced, the rest stays.

    {"model", "device", "runs": [what was run, where, with which versions], "results": {dtype: {stage: ...}}}
    Raises ValueError for a file of another model or device.
    """

    def __init__(self, path: Path | None, model: str, device: str):
        self._path = path
        self.data: dict[str, Any] = {"model": model, "device": device, "runs": [], "results": {}}
        if path and path.exists():
            self.data = json.loads(path.read_text())
            if (self.data["model"], self.data["device"]) != (model, device):
                raise ValueError(f"{path}: holds results of {self.data['model']} on {self.data['device']}")
        self.run: dict[str, Any] = {"command": sys.argv[1:], "time": time.strftime("%Y-%m-%d %H:%M")}
        self.run |= {"machine": machine(), "sides": {}, "idle_cores": {}}
        self.data["runs"].append(self.run)

    @property
    def results(self) -> Results:
        return self.data["results"]

    def add(self, dtype: str, stage: str, cell: Cell) -> None:
        self.results.setdefault(dtype, {})[stage] = cell | {"run": len(self.data["runs"]) - 1}
        self.save()

    def save(self) -> None:
        if self._path:
            unfinished = self._path.with_name(f"{self._path.name}.tmp")
            unfinished.write_text(json.dumps(self.data, indent=1, allow_nan=False))
            unfinished.replace(self._path)


def machine() -> dict[str, Any]:
    """The host: processor, cores that this process may use, memory, how busy it is."""
    info = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", info)
    return {
        "processor": model[1] if model else platform.machine(),
        "instructions": [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {name} " in info],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def random_weights(name: str) -> str:
    """The folder of random weights of a size, written by a process of its own."""
    with Worker(JAX_PLATFORMS="cpu") as worker:
        return worker.call("weights:folder", name=name).value


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, checked against each other. Exits with status 2 and one line if they do not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=STAGES, default="cpu")
    parser.add_argument("--dtypes", type=names, help="by default float32,bfloat16 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--only", type=names, help="stages, such as unet,vae")
    parser.add_argument("--sides", type=names, help="such as sdjax,pytorch")
    parser.add_argument("--peer", type=names, default=[], help="flax-0.35: the UNet that diffusers 0.40 deleted")
    parser.add_argument("--peer-python", help="of an environment with diffusers==0.35.2, transformers<5, flax, jax")
    parser.add_argument("--rounds", type=int, help="calls of each side, in place of each stage's own number")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, two calls, no torch.compile by default")
    parser.add_argument("--model", type=Path, help="a folder of Stable Diffusion 1 in place of random weights")
    parser.add_argument("--cache", type=Path, help="keeps compiled programs there; first calls are no measure then")
    parser.add_argument("--out", type=Path, help="JSON file that keeps the results")
    given = parser.parse_args(arguments)
    here = [side for side, entry in SIDES.items() if given.device in entry.devices]
    sides = [side for side in here if not SIDES[side].is_peer]
    choices = {
        "dtypes": (list(LIMITS), DTYPES[given.device]),
        "only": (list(STAGES[given.device]), STAGES[given.device]),
        "sides": (sides, TINY_SIDES if given.tiny else sides),
        "peer": ([side for side in here if SIDES[side].is_peer], ()),
    }
    for option, (known, default) in choices.items():
        asked = getattr(given, option) or default
        if unknown := set(asked) - set(known):
            parser.error(f"--{option}: unknown {', '.join(sorted(unknown))}; known: {', '.join(known)}")
        setattr(given, option, [name for name in known if name in asked])
    if bool(given.peer) != bool(given.peer_python):
        parser.error("--peer and --peer-python come together")
    if given.rounds is not None and given.rounds < 1:
        parser.error("--rounds: at least 1")
    if given.model and (given.tiny or not given.model.is_dir()):
        parser.error("--model: a folder that exists, without --tiny")
    return given


def names(text: str) -> list[str]:
    """'unet,vae' -> ['unet', 'vae']"""
    return text.split(",")


def stages(given: argparse.Namespace) -> dict[str, Stage]:
    """Those that are asked for, by name."""
    chosen = {name: STAGES[given.device][name] for name in given.only}
    chosen = {name: stage.tiny if given.tiny else stage for name, stage in chosen.items()}
    return {name: replace(stage, rounds=given.rounds or stage.rounds) for name, stage in chosen.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables of all that the record holds; 0 if every side gave PyTorch's results."""
    given = parse(arguments)
    folder = str(given.model or random_weights("tiny" if given.tiny else "sd15"))
    pythons = dict.fromkeys(given.sides, sys.executable) | dict.fromkeys(given.peer, given.peer_python)
    try:
        record = Record(given.out, Path(folder).name, given.device)
        for dtype in given.dtypes:
            with started(pythons, folder, dtype, given.device, given.cache, record.run) as workers:
                for name, stage in stages(given).items():
                    record.add(dtype, name, measure(workers, name, stage, dtype))
        record.save()
    except (ValueError, ArithmeticError, RuntimeError) as problem:
        print(f"run.py: {problem}", file=sys.stderr)
        return 2 if isinstance(problem, ValueError) else 1
    print(tables(record.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
