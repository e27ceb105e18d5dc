"""Times loading a full-size Stable Diffusion 1.5 in float16: `python scripts/time_loading.py [repeats]`.

Against it stands what is least: reading every tensor of the same files and casting it. Prints the medians of both, over
repeats in turn, and their ratio, for float32 and bfloat16; exit status 1 if a ratio is above the limit. The weights are
random. Needs 2 GB of the temporary folder, 9 GB of memory, a minute.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from full_size import CLASSES, SD15, Values, filled
from jax.typing import DTypeLike
from safetensors import safe_open

from sdjax.models.base import Model

LIMIT = 1.2


def finite_bits() -> Values:
    """Random finite float16 values."""
    bits = np.random.default_rng(0)
    return lambda _, shape: bits.integers(0, 0x7C00, shape, np.uint16).view(np.float16)


def cast(path: Path, dtype: DTypeLike) -> list[np.ndarray]:
    """Every tensor of the folder's file."""
    with safe_open(next(path.glob("*.safetensors")), framework="numpy") as file:
        return [file.get_tensor(name).astype(dtype) for name in file.keys()]  # noqa: SIM118 - it is no dict


def seconds(function: Callable, *args: object) -> float:
    """How long a call takes, until all arrays of its result are there; they are freed after it."""
    start = time.perf_counter()
    result = function(*args)
    jax.block_until_ready(nnx.state(result) if isinstance(result, nnx.Module) else result)
    return time.perf_counter() - start


def compare(paths: dict[type[Model], Path], dtype: DTypeLike, repeats: int) -> tuple[float, float]:
    """Median seconds of the least and of ours, for all models."""
    times = [
        (
            sum(seconds(cast, path, dtype) for path in paths.values()),
            sum(seconds(cls.from_pretrained, path, None, None, dtype) for cls, path in paths.items()),
        )
        for _ in range(repeats)
    ]
    least, ours = map(statistics.median, zip(*times, strict=True))
    return least, ours


def main() -> None:
    """Prints a line a dtype, then exits with the status."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    ratios = []
    with tempfile.TemporaryDirectory() as root:
        paths = {cls: Path(root) / name for name, cls in CLASSES.items()}
        for name, cls in CLASSES.items():
            filled(cls, getattr(SD15, name), finite_bits(), jnp.float16).save_pretrained(paths[cls])
        for dtype in (jnp.float32, jnp.bfloat16):
            least, ours = compare(paths, dtype, repeats)
            ratios.append(ours / least)
            name = jnp.dtype(dtype).name
            print(f"{name:<10}read and cast {least:6.2f} s   load {ours:6.2f} s   ratio {ratios[-1]:.2f}", flush=True)
    sys.exit(max(ratios) > LIMIT)


if __name__ == "__main__":
    main()
