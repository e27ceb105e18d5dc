"""A run of a toy, also as a process that tests kill: python toy_run.py FOLDER"""

import itertools
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.training import steps, stopping
from sdjax.training.checkpoints import Checkpoints
from sdjax.training.log import Log
from sdjax.training.steps import Plan

STEPS = 60
LIMIT = 2


class Toy:
    """Follows the mean of noisy batches; its loss is NaN at the step `breaks_at`."""

    def __init__(self, breaks_at=-1, breaks=None):
        self._breaks_at, self._step = breaks_at, jax.jit(self._stepped, donate_argnums=0)
        self._breaks = breaks or (lambda state, loss: (state, loss * jnp.nan))

    def state(self):
        return {"step": jnp.int32(0), "w": jnp.full(4, 5.0), "half": jnp.ones(3, jnp.bfloat16)}

    def placed(self, batch):
        return jax.device_put(batch)

    def __call__(self, state, batch, key):
        return self._step(state, batch, key)

    def _stepped(self, state, batch, key):
        noise = jax.random.normal(jax.random.fold_in(key, state["step"]), (4,))
        error = state["w"] - batch["x"] + 0.1 * noise
        done = {"step": state["step"] + 1, "w": state["w"] - 0.1 * error, "half": state["half"] * 0.99}
        loss = (error**2).mean()
        broken = self._breaks(done, loss)
        choose = state["step"] + 1 == self._breaks_at
        done, loss = jax.tree.map(lambda own, other: jnp.where(choose, other, own), (done, loss), broken)
        return done, {"loss": loss, "grad_norm": jnp.abs(error).max()}


def batches(first):
    for number in itertools.count(first):
        yield {"x": np.random.default_rng([3, number]).standard_normal(4).astype(np.float32)}


def run(folder: Path, *, total=STEPS, toy=None, wanted="latest", pause=0.0, stop=None, every=5, **plan):
    toy = toy or Toy()
    checkpoints = Checkpoints(folder / "checkpoints", LIMIT)
    plan = {"on_progress": lambda progress: time.sleep(pause), **plan}
    try:
        state, first = steps.restored(checkpoints, toy.state(), wanted)
        checkpoints.check_room(state)
        with Log(folder / "log.csv", first) as log, stopping.requested() as requested:
            planned = Plan(total, every, **plan)
            key = jax.random.key(1)
            return steps.run(toy, state, first, batches, key, planned, checkpoints, log, stop or requested)
    finally:
        checkpoints.close()


if __name__ == "__main__":
    try:
        run(Path(sys.argv[1]), pause=0.02)
    except stopping.Stopped as error:
        print(error, file=sys.stderr)
        sys.exit(128 + error.signum)
