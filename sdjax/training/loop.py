"""A run: steps until the budget is spent, with a log and checkpoints, continued where it was cut."""

import csv
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sdjax.training import checkpoint
from sdjax.training.step import Data, TrainState


@dataclass(frozen=True)
class Budget:
    """How long a run goes on: until `steps` or `minutes` of training, whichever is first.

    A run bounded by steps alone is the same bit for bit however often it is cut.
    """

    steps: float = float("inf")
    minutes: float = float("inf")

    def spent(self, step: int, seconds: float) -> float:
        """The share of the budget that is used: 0 at the beginning, 1 or more at the end."""
        return max(step / self.steps, seconds / 60 / self.minutes)


def learning_rate_scale(step: int, spent: float, *, warmup: int) -> float:
    """Linear from 0 over `warmup` steps, under 1 - spent, which falls to 0 at the end (arXiv:2502.15938)."""
    return max(0.0, min((step + 1) / warmup, 1 - spent))


def fit(
    step: Callable[[TrainState, Data, Array, Array], tuple[TrainState, dict[str, Array]]],
    state: TrainState,
    data: Data,
    key: Array,
    *,
    budget: Budget,
    warmup: int,
    path: Path,
    save_seconds: float = 120,
    log_steps: int = 50,
    measure: Callable[[TrainState], dict[str, float]] | None = None,
    measure_steps: int = 1000,
) -> TrainState:
    """Runs a training step until the budget is spent and returns the last state.

    The state is saved at `path` every save_seconds and at the end, and read from there at the start if it exists.
    Every log_steps the mean metrics go to the screen and to `path` with the ending .csv. Every measure_steps what
    `measure` finds in the state goes to the screen and to the ending .measured.csv.
    """
    run, seconds = {"state": state, "seconds": jnp.zeros(())}, 0.0
    if path.exists():
        run = checkpoint.restore(path, run)
        state, seconds = run["state"], float(run["seconds"])
    step = jax.jit(step, donate_argnums=0)
    done, metrics, saved, began = int(state.step), [], time.monotonic(), time.monotonic() - seconds
    while (spent := budget.spent(done, seconds)) < 1:
        scale = learning_rate_scale(done, spent, warmup=warmup)
        state, values = step(state, data, key, jnp.float32(scale))
        metrics.append(values)
        done, seconds = done + 1, time.monotonic() - began
        if done % log_steps == 0:
            _log(path.with_suffix(".csv"), done, seconds, metrics)
            metrics.clear()
        if measure is not None and done % measure_steps == 0:
            _append(path.with_suffix(".measured.csv"), {"step": done, **measure(state)})
        if time.monotonic() - saved > save_seconds:
            checkpoint.save(path, {"state": state, "seconds": jnp.float32(seconds)})
            saved = time.monotonic()
    checkpoint.save(path, {"state": state, "seconds": jnp.float32(seconds)})
    return state


def _log(path: Path, step: int, seconds: float, metrics: list[dict[str, Array]]) -> None:
    """Appends one line: step, seconds, the mean of each metric."""
    row = {"step": step, "seconds": round(seconds, 1)}
    row |= {name: float(np.mean([np.asarray(values[name]) for values in metrics])) for name in metrics[0]}
    _append(path, row)


def _append(path: Path, row: dict[str, float]) -> None:
    """One line to the screen and to a file."""
    print("  ".join(f"{name} {value:.6g}" for name, value in row.items()), flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
