"""Times loading a full-size Stable Diffusion 1.5 of float16 files: `python scripts/bench/loading.py`.

Against it stands what is least: reading every tensor of the same files and casting it. Prints the medians of both, over
rounds in turn, and their ratio, for float32 and bfloat16; exit status 1 if a ratio is above the limit (but for --tiny).
The weights are random. Needs 2 GB of the temporary folder, 9 GB of memory, a minute.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from run import random_weights
from safetensors import safe_open
from stages import timed
from table import markdown

from sdjax.components import load_model

LIMIT = 1.2
COMPONENTS = ("text_encoder", "unet", "vae")


def least(folder: Path, dtype: str) -> list[np.ndarray]:
    """Every tensor of a component, read and cast."""
    with safe_open(next(folder.glob("*.safetensors")), framework="numpy") as file:
        return [file.get_tensor(name).astype(jax.numpy.dtype(dtype)) for name in file.keys()]  # noqa: SIM118


def ours(folder: Path, dtype: str) -> nnx.State:
    """The parameters of a component, loaded."""
    return jax.block_until_ready(nnx.state(load_model(folder.name, folder, dtype=dtype)))


def main() -> int:
    """Prints the table; 0 if loading takes little more than the least."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, as a rehearsal")
    given = parser.parse_args()
    folders = [Path(random_weights("tiny" if given.tiny else "sd15"), name) for name in COMPONENTS]
    rows = []
    for dtype in ("float32", "bfloat16"):
        seconds: dict[Callable, list[float]] = {least: [], ours: []}
        for _ in range(given.rounds):
            for way, taken in seconds.items():
                taken.append(sum(timed(partial(way, folder, dtype))[0] for folder in folders))
        medians = [statistics.median(taken) for taken in seconds.values()]
        rows.append([dtype, *medians, medians[1] / medians[0]])
    print(markdown(["dtype", "read and cast, s", "load, s", "ratio"], rows))
    return int(not given.tiny and max(row[-1] for row in rows) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
