"""All that one short loan of an NVIDIA GPU should tell, in 15 minutes: `python scripts/bench/gpu.py --out results`.

1. The attention kernels of Stable Diffusion's shapes, forward and backward, against the plain form in float32; their
   errors must not be more than twice those of the plain form in the same dtype.
2. sdjax, PyTorch eager and torch.compile on random weights of Stable Diffusion 1.5 as `run.py`: text encoder, UNet, VAE
   and pictures of 50 steps. PyTorch needs CUDA and diffusers; without, sdjax alone.
3. Training steps of the UNet on one batch, whose loss must fall.

In bfloat16, then in float16. Prints tables; results/gpu.json, which is written after each part, holds everything. A
part that fails is reported and the rest goes on; exit status 1. After --minutes no further part is started.
--tiny rehearses all of it on a CPU with a tiny model. Needs `sdjax[cuda]`; nothing is downloaded.
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from processes import Worker
from run import Record, environment, measure, random_weights, say, started
from stages import STAGES, Stage, timed
from table import Cell, markdown, tables

DTYPES = ("bfloat16", "float16")
SIDES = ("sdjax", "pytorch", "torch.compile")
SHAPES = {  # batch, queries, keys, heads, width
    "gpu": (
        (2, 4096, 4096, 8, 40),
        (2, 4096, 77, 8, 40),
        (2, 1024, 1024, 8, 80),
        (2, 256, 256, 8, 160),
        (2, 4096, 4096, 10, 64),
        (1, 4096, 4096, 1, 512),
    ),
    "cpu": ((2, 64, 64, 4, 8), (2, 64, 77, 4, 8)),
}
CALLS = 20
ATTENTION = "dtype", "shape", "form", "s", "plain, s", "error", "plain's", "of the gradient", "plain's"
TRAINING = "dtype", "batch", "first loss", "last loss", "median s a step", "peak GB"


def attention(dtype: str, shape: list[int]) -> list[Any]:
    """A row: the form that runs here, its seconds and errors and those of the plain form."""
    import jax
    import jax.numpy as jnp

    from sdjax.ops.attention import FORMS
    from sdjax.ops.attention import attention as chosen
    from sdjax.ops.attention_plain import plain

    batch, queries, keys, heads, width = shape
    random = jax.random.split(jax.random.key(0), 4)
    q, k, v, weights = (
        jax.random.normal(key, (batch, tokens, heads, width))
        for key, tokens in zip(random, (queries, keys, keys, queries), strict=True)
    )

    def with_gradient(form: Callable, dtype: str) -> tuple[Callable, list[jax.Array]]:
        inputs = [x.astype(dtype) for x in (q, k, v)]
        forward = jax.jit(lambda *qkv: form(*qkv))
        backward = jax.jit(jax.grad(lambda *qkv: (form(*qkv).astype(jnp.float32) * weights).sum(), (0, 1, 2)))
        return lambda: forward(*inputs).block_until_ready(), [forward(*inputs), *backward(*inputs)]

    def errors(found: list[jax.Array]) -> tuple[float, float]:
        off = [float(abs(a.astype(b.dtype) - b).max() / abs(b).max()) for a, b in zip(found, exact, strict=True)]
        return off[0], max(off[1:])

    with jax.default_matmul_precision("highest"):
        _, exact = with_gradient(plain, "float32")
    runs, found = zip(*(with_gradient(form, dtype) for form in (chosen, plain)), strict=True)
    seconds = [statistics.median(timed(run)[0] for _ in range(CALLS)) for run in runs]
    (ours, gradient), (least, least_gradient) = map(errors, found)
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    form, suits = FORMS[platform]
    name = form.__name__ if suits(q.astype(dtype), k.astype(dtype)) else plain.__name__
    return [dtype, "x".join(map(str, shape)), name, *seconds, ours, least, gradient, least_gradient]


def training(folder: str, batch: int, steps: int) -> list[Any]:
    """A row: losses, seconds and memory of steps in bfloat16, with parameters and Adam's averages in float32."""
    import jax
    import jax.numpy as jnp
    import optax

    from sdjax.models import UNet2DConditionModel
    from sdjax.runtime import parallel
    from sdjax.runtime.network import Graph, Network, in_float32
    from sdjax.training.step import TrainState, train_step

    unet = UNet2DConditionModel.from_pretrained(folder, "unet", dtype="bfloat16")
    graph, params = Graph(unet), Network(in_float32(unet), parallel.data_mesh()).params()
    size, channels = unet.config.sample_size, unet.config.in_channels
    keys, width = jax.random.split(jax.random.key(0), 3), unet.config.cross_attention_dim
    latents, noise = (jax.random.normal(key, (batch, size, size, channels)) for key in keys[:2])
    data = latents, jnp.arange(1.0, 1000.0, 999 / batch), jax.random.normal(keys[2], (batch, 77, width)), noise

    def loss(params: Any, data: Any, key: jax.Array) -> tuple[jax.Array, dict]:
        *inputs, wanted = data
        found = graph.merge(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))(*inputs)
        return ((found.astype(jnp.float32) - wanted) ** 2).mean(), {}

    optimizer = optax.adam(1e-5)
    state = TrainState.create(params, optimizer)
    del unet, params
    step = jax.jit(train_step(loss, optimizer), donate_argnums=0)
    losses, seconds = [], []
    for _ in range(steps + 1):  # the first one compiles
        start = time.perf_counter()
        state, metrics = step(state, data, keys[0], 1.0)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - start)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return ["bfloat16", batch, losses[0], losses[-1], statistics.median(seconds[1:]), peak and peak / 1e9]


def pytorch_runs(device: str) -> bool:
    """Whether PyTorch's sides can run in this environment."""
    try:
        import sides.pytorch
    except (ImportError, RuntimeError):  # diffusers raises the latter for what it imports late
        return False
    return device == "cpu" or sides.pytorch.torch.cuda.is_available()


class Loan:
    """The parts, each in processes of its own, until the time is over."""

    def __init__(self, out: Path, minutes: float, tiny: bool):
        self._until, self._tiny, self._device = time.monotonic() + 60 * minutes, tiny, "cpu" if tiny else "gpu"
        self._folder = random_weights("tiny" if tiny else "sd15")
        self._record = Record(out / "gpu.json", Path(self._folder).name, self._device)
        self.failures: list[str] = []

    def attempt(self, name: str, part: Callable[[], Any]) -> Any:
        """What the part returns; None: it failed, which is noted, or there was no time."""
        if time.monotonic() > self._until:
            self.failures.append(f"{name}: no time was left")
            return None
        say(name)
        try:
            return part()
        except (ArithmeticError, RuntimeError) as problem:
            self.failures.append(f"{name}: {problem}")
            return None

    def worker(self) -> Worker:
        return Worker(**environment(self._device))

    def attention(self, dtype: str) -> None:
        with self.worker() as worker:
            for shape in SHAPES[self._device]:
                row = worker.call("gpu:attention", dtype=dtype, shape=shape).value
                self._keep("attention", ATTENTION, row)
                if not (row[5] <= 2 * row[6] and row[7] <= 2 * row[8]):
                    self.failures.append(f"attention in {dtype}, {row[1]}: errors over twice the plain form's")

    def training(self) -> None:
        batch, steps = (2, 3) if self._tiny else (8, 10)
        with self.worker() as worker:
            row = worker.call("gpu:training", folder=self._folder, batch=batch, steps=steps).value
        self._keep("training", TRAINING, row)
        if not row[3] < row[2]:
            raise ArithmeticError(f"the loss went from {row[2]} to {row[3]}")

    def _keep(self, part: str, header: Sequence[str], row: list[Any]) -> None:
        row = [
            value if not isinstance(value, float) or math.isfinite(value) else None for value in row
        ]  # JSON has no NaN
        self._record.run.setdefault(part, [list(header)]).append(row)
        self._record.save()

    def sides(self, dtype: str) -> None:
        with self.worker() as worker:
            known = SIDES if worker.call("gpu:pytorch_runs", device=self._device).value else SIDES[:1]
        pythons = dict.fromkeys(known[:2] if self._tiny else known, sys.executable)
        with started(pythons, self._folder, dtype, self._device, None, self._record.run) as workers:
            for name, stage in STAGES["gpu"].items():
                stage = stage.tiny if self._tiny else stage
                if cell := self._measured(workers, name, stage, dtype):
                    self._record.add(dtype, name, cell)

    def _measured(self, workers: Mapping[str, Worker], name: str, stage: Stage, dtype: str) -> Cell | None:
        """A stage, again without the sides whose processes it ended; None if it failed."""
        able = {side: worker for side, worker in workers.items() if worker.is_alive}
        cell = self.attempt(f"{name} in {dtype}", partial(measure, able, name, stage, dtype))
        if cell is None and not all(worker.is_alive for worker in able.values()):
            return self._measured(able, name, stage, dtype)
        return cell

    def tables(self) -> str:
        parts = [self._record.run[part] for part in ("attention", "training") if part in self._record.run]
        shown = [markdown(header, rows) for header, *rows in parts]
        return "\n\n".join([*shown, tables(self._record.results), *self.failures])


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables and what failed; 0 if nothing did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")), help="[default: $OUT or here]")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    loan = Loan(given.out, given.minutes, given.tiny)
    for dtype in DTYPES:
        loan.attempt(f"attention in {dtype}", partial(loan.attention, dtype))
    loan.attempt("sides in bfloat16", partial(loan.sides, "bfloat16"))
    loan.attempt("training", loan.training)
    loan.attempt("sides in float16", partial(loan.sides, "float16"))
    print(loan.tables())
    return int(bool(loan.failures))


if __name__ == "__main__":
    sys.exit(main())
