"""sdjax against PyTorch diffusers, on the same random full-size weights of Stable Diffusion 1.5.

    python scripts/bench.py --out bench.json                           two CPU cores: half an hour, 24 GB of memory
    python scripts/bench.py --out bench.json --only unet --dtypes bfloat16     that part again
    python scripts/bench.py --quick          a narrow model at 256x256, three calls, no torch.compile: two minutes
    python scripts/bench.py --peer flax-0.35 --peer-python .../bin/python      also the deleted Flax UNet
    python scripts/bench.py --device gpu --out gpu.json --cache compiled    again: from compiled programs, in minutes
    python scripts/bench.py --device tpu --sides sdjax --out tpu.json          without PyTorch

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
    python scripts/bench.py --device gpu --out gpu.json
The driver must be one for CUDA 13; torch.compile needs a C compiler. Nothing is downloaded. One device is used.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_stages import STAGES
from bench_table import tables
from processes import in_a_process

from sdjax.files import replacing

SCRIPT = Path(__file__).with_name("bench_side.py")
SIDES = {"cpu": ("sdjax", "pytorch", "torch.compile"), "gpu": ("sdjax", "pytorch", "torch.compile"), "tpu": ("sdjax",)}
DTYPES = {"cpu": ("float32", "bfloat16"), "gpu": ("bfloat16",), "tpu": ("bfloat16",)}
PEERS = ("flax-0.35",)  # they know the UNet alone
REFERENCE = "pytorch"
LIMITS = {"float32": 1e-3, "bfloat16": 0.2}  # of the error, as a part of max |reference|
QUICK_SIDES, QUICK_ROUNDS = ("sdjax", "pytorch"), 3
IDLE_LIMIT = 0.02  # cores that a side may use while it waits
PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}


class Child:
    """A side in its process, and what it said when its weights were loaded."""

    def __init__(self, side: str, python: str, folder: Path, dtype: str, device: str, cache: Path | None = None):
        environment = {
            "JAX_PLATFORMS": PLATFORMS[device],
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "HF_HUB_OFFLINE": "1",
        }
        if cache:
            environment |= {"JAX_COMPILATION_CACHE_DIR": f"{cache}/jax", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        else:
            environment |= {"JAX_ENABLE_COMPILATION_CACHE": "false", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        self.side = side
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `close`
        self._process = subprocess.Popen(
            [python, str(SCRIPT), side, str(folder), dtype, device],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.hello = self._reply()
        self.idle_cpu, self.idle_wall, self._idle_from = 0.0, 0.0, time.perf_counter()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Its answer. Raises RuntimeError with the end of what it printed, if it has ended."""
        self.idle_wall += time.perf_counter() - self._idle_from
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request, allow_nan=False) + "\n")
            self._process.stdin.flush()
        reply = self._reply()
        self.idle_cpu += reply.pop("idle_cpu")
        self._idle_from = time.perf_counter()
        return reply

    def _reply(self) -> dict[str, Any]:
        if line := self._process.stdout.readline():
            return json.loads(line)
        status = self._process.wait()
        self._log.seek(0)
        end = "".join(self._log.readlines()[-20:])
        self.close()
        raise RuntimeError(f"{self.side} ended with status {status}:\n{end}")

    def close(self) -> None:
        """Ends it, when it has answered. Again: does nothing."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()


@contextlib.contextmanager
def children(
    pythons: dict[str, str], folder: Path, dtype: str, device: str, cache: Path | None
) -> Iterator[list[Child]]:
    """The sides, one started after the other, ended afterwards."""
    with contextlib.ExitStack() as stack:
        started = []
        for side, python in pythons.items():
            started.append(Child(side, python, folder, dtype, device, cache))
            stack.callback(started[-1].close)
            say(f"{side}: weights loaded in {started[-1].hello['load']:.1f} s")
        yield started


def measure(sides: Sequence[Child], stage: str, rounds: int, dtype: str) -> dict[str, Any]:
    """A stage, the sides taking turns: {"flops", "sides": {side: {"seconds", "peak", "first", "error", ...}}}.

    Raises ArithmeticError if a result is not PyTorch's.
    """
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        outputs = {child.side: f"{folder}/{child.side}.npy" for child in sides}
        for child in sorted(sides, key=lambda child: child.side != REFERENCE):  # it chooses the layouts
            layouts = found[REFERENCE]["layouts"] if REFERENCE in found else {}
            found[child.side] = child.ask(prepare=stage, out=outputs[child.side], layouts=layouts)
            say(f"{child.side}: {stage}, first call {found[child.side]['first']:.2f} s")
        errors = {side: error(outputs[side], outputs.get(REFERENCE)) for side in outputs}
    calls: dict[str, list[dict[str, Any]]] = {child.side: [] for child in sides}
    if wrong := {side: value for side, value in errors.items() if value is not None and not value <= LIMITS[dtype]}:
        raise ArithmeticError(f"{stage} in {dtype}: not PyTorch's result, error / max |reference| is {wrong}")
    for _ in range(rounds):
        for child in sides:
            calls[child.side].append(child.ask(measure=stage))
    return {
        "flops": found.get(REFERENCE, {"flops": None})["flops"],
        "sides": {
            child.side: {
                "seconds": [call["seconds"] for call in calls[child.side]],
                "peak": max(call["peak"] for call in calls[child.side]),
                "before": min(call["before"] for call in calls[child.side]),
                "first": found[child.side]["first"],
                "first_peak": found[child.side]["peak"],
                "layouts": found[child.side]["layouts"],
                "error": errors[child.side],
            }
            for child in sides
        },
    }


def error(path: str, reference: str | None) -> float | None:
    """max |a - b| / max |b| of the arrays in two files; None: there is nothing to compare with."""
    if reference is None:
        return None
    a, b = np.load(path), np.load(reference)
    return float(np.abs(a - b).max() / np.abs(b).max()) if a.shape == b.shape else float("inf")


def model_folder(name: str) -> str:
    """The folder of random weights of this size, written if it is not there."""
    import full_size

    size = {"sd15": full_size.SD15, "narrow": full_size.NARROW}[name]
    path = Path(tempfile.gettempdir(), "sdjax-bench", f"{name}-{size.digest}")
    if not path.is_dir():
        say(f"writing random weights to {path}")
        full_size.write_pipeline(size, path)
    return str(path)


def machine() -> dict[str, Any]:
    """The host: processor, cores that this process may use, memory, how busy it is."""
    info = Path("/proc/cpuinfo").read_text()
    fields = dict(line.split("\t", 1)[::1] for line in info.split("\n\n")[0].splitlines() if "\t" in line)
    fields = {key.strip(): value.strip(" \t:") for key, value in fields.items()}
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in fields.get("flags", "").split()]
    return {
        "processor": fields.get("model name", platform.machine()),
        "instructions": flags,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    }


class Record:
    """The results as a JSON file, written after every stage: what is measured again is replaced, the rest stays.

    {"model", "device", "runs": [what was run, where, with which versions], "results": {dtype: {stage: ...}}}
    Raises ValueError for a file of another model or device.
    """

    def __init__(self, path: Path | None, model: str, device: str):
        self._path = path
        self._data: dict[str, Any] = {"model": model, "device": device, "runs": [], "results": {}}
        if path and path.exists():
            self._data = json.loads(path.read_text())
            if (self._data["model"], self._data["device"]) != (model, device):
                raise ValueError(f"{path}: holds results of {self._data['model']} on {self._data['device']}")
        self.run = {"command": sys.argv[1:], "time": time.strftime("%Y-%m-%d %H:%M"), "machine": machine(), "sides": {}}
        self._data["runs"].append(self.run)

    @property
    def results(self) -> dict[str, Any]:
        """By dtype, then by stage."""
        return self._data["results"]

    def add(self, dtype: str, stage: str, cell: dict[str, Any]) -> None:
        self.results.setdefault(dtype, {})[stage] = cell | {"run": len(self._data["runs"]) - 1}
        self.save()

    def save(self) -> None:
        if self._path:
            with replacing(self._path) as unfinished:
                unfinished.write_text(json.dumps(self._data, indent=1, allow_nan=False))


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def run(given: argparse.Namespace, folder: Path, record: Record) -> None:
    """Measures what is asked for."""
    pythons = {side: sys.executable for side in given.sides} | {side: given.peer_python for side in given.peer}
    for dtype in given.dtypes:
        with children(pythons, folder, dtype, given.device, given.cache) as sides:
            record.run["sides"] |= {child.side: child.hello for child in sides}
            for name in given.only:
                stage = STAGES[given.device][name]
                able = [child for child in sides if child.side not in PEERS or stage.what == "unet"]
                rounds = given.rounds or (QUICK_ROUNDS if given.quick else stage.rounds)
                record.add(dtype, name, measure(able, name, rounds, dtype))
            idle = {child.side: child.idle_cpu / child.idle_wall for child in sides}
        record.run.setdefault("idle_cores", {})[dtype] = idle
        for side, cores in idle.items():
            if cores > IDLE_LIMIT:
                say(f"{side} used {cores:.2f} cores while it waited: the figures of the others are too high")
    record.save()


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
    parser.add_argument("--quick", action="store_true", help="a narrow model, few calls, no torch.compile by default")
    parser.add_argument("--model", type=Path, help="a folder of Stable Diffusion 1 in place of random weights")
    parser.add_argument(
        "--cache", type=Path, help="folder of compiled programs, for the next run; first calls are no measure then"
    )
    parser.add_argument("--out", type=Path, help="JSON file that keeps the results")
    given = parser.parse_args(arguments)
    sides = SIDES[given.device]
    choices = {
        "dtypes": (given.dtypes, DTYPES["cpu"], DTYPES[given.device]),
        "only": (given.only, tuple(STAGES[given.device]), tuple(STAGES[given.device])),
        "sides": (given.sides, sides, set(sides) & set(QUICK_SIDES) if given.quick else sides),
        "peer": (given.peer, PEERS if given.device == "cpu" else (), ()),
    }
    for option, (asked, known, default) in choices.items():
        if unknown := set(asked or ()) - set(known):
            parser.error(f"--{option}: unknown {', '.join(sorted(unknown))}; known: {', '.join(known)}")
        setattr(given, option, [name for name in known if name in (asked or default)])
    if bool(given.peer) != bool(given.peer_python):
        parser.error("--peer and --peer-python come together")
    if given.rounds is not None and given.rounds < 1:
        parser.error("--rounds: at least 1")
    if given.model and (given.quick or not given.model.is_dir()):
        parser.error("--model: a folder that exists, without --quick")
    return given


def names(text: str) -> list[str]:
    """'unet,vae' -> ['unet', 'vae']"""
    return text.split(",")


def main() -> int:
    """Prints the tables of all that the record holds; 0 if every side gave PyTorch's results."""
    given = parse()
    folder = given.model or Path(in_a_process(model_folder, "narrow" if given.quick else "sd15"))
    try:
        record = Record(given.out, folder.name, given.device)
        run(given, folder, record)
    except ValueError as problem:
        print(f"bench.py: {problem}", file=sys.stderr)
        return 2
    except (ArithmeticError, RuntimeError) as problem:
        print(f"bench.py: {problem}", file=sys.stderr)
        return 1
    print(tables(record.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
