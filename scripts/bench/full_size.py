"""The full-size models of a family against PyTorch, with random weights.

    python scripts/bench/full_size.py          Stable Diffusion 1.5: all models in float32
    python scripts/bench/full_size.py sdxl     SDXL base: the UNet in bfloat16
    python scripts/bench/full_size.py tiny     tiny models, as a rehearsal; also tiny-xl

For each computation one process loads the model into PyTorch, another one into sdjax. Prints the parameters, load and
call times of sdjax, the host memory that loading takes at its peak as a multiple of the parameters' size, and errors;
exit status 1 if one is over its limit. Needs Linux, the `test` extra, some minutes, memory (7 GB for Stable Diffusion
1.5, 14 for SDXL) and 2 or 5 GB of the temporary folder, whose folder sdjax-bench keeps the weights.
"""

import argparse
import sys
import tempfile
from dataclasses import asdict
from typing import Any

import numpy as np
from processes import Reply, Worker
from run import environment, random_weights
from stages import NETWORKS, Stage, error
from table import markdown

LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}  # of the error, as a part of max |reference|
MEMORY_LIMIT = 1.3  # of the host memory that loading takes, as a multiple of the parameters' size
MEMORY_BESIDE = 2**24  # bytes that loading may take whatever the size
LEAST_DEVIATION = 0.1  # of the reference, below which the comparison would say little
WIDTHS = {"float32": 4, "bfloat16": 2}
LAYOUTS = {"unet": "contiguous", "vae": "contiguous"}
SD1 = [Stage("text_encoder"), Stage("vae_encode"), Stage("vae"), Stage("unet", batch=2)], "float32"
XL = [Stage("unet")], "bfloat16"
FAMILIES = {"sd15": SD1, "sdxl": XL, "tiny": SD1, "tiny-xl": XL}
HEADER = "", "parameters", "load s", "host peak / size", "call s", "std of ref", "error / max abs ref", ""


def computed(side: str, folder: str, stage: Stage, dtype: str) -> tuple[Reply, np.ndarray, float]:
    """What loading said and took, what the side computes, and the seconds of a call once it is compiled."""
    exact = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    with tempfile.TemporaryDirectory() as results, Worker(**environment("cpu"), **exact) as worker:
        worker.call("sides:running.start", side=side, dtype=dtype, device="cpu")
        load = worker.call("sides:running.load", folder=folder, component=NETWORKS[stage.what])
        out = f"{results}/out.npy"
        worker.call("sides:running.prepare", stage=asdict(stage), out=out, layouts=LAYOUTS)
        return load, np.load(out), worker.call("sides:running.measure").value["seconds"]


def check(folder: str, stage: Stage, dtype: str) -> list[Any]:
    """A row of the table."""
    reference, wanted, _ = computed("pytorch", folder, stage, dtype)
    load, found, seconds = computed("sdjax", folder, stage, dtype)
    size, taken = load.value * WIDTHS[dtype], load.peak - load.before
    off, deviation = error(found, wanted), float(wanted.std())
    is_right = load.value == reference.value and off <= LIMITS[dtype] and deviation >= LEAST_DEVIATION
    failed = "" if is_right and taken <= MEMORY_LIMIT * size + MEMORY_BESIDE else "FAILED"
    return [stage.what, f"{load.value:,}", load.seconds, taken / size, seconds, deviation, f"{off:.1e}", failed]


def main() -> int:
    """Prints the table; 0 if all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="?", choices=FAMILIES, default="sd15")
    family = parser.parse_args().family
    stages, dtype = FAMILIES[family]
    folder = random_weights(family)
    rows = [check(folder, stage, dtype) for stage in stages]
    print(markdown(HEADER, rows))
    return int(any(row[-1] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
