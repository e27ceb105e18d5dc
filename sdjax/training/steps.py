"""The steps of a run, one after the other, from where it was cut: checkpoints, a log, what is done now and then."""

import collections
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
from jax import Array

from sdjax.training.checkpoints import Checkpoints, all_finite
from sdjax.training.log import Log
from sdjax.training.stopping import Stop, Stopped

LOSS = "loss"
AHEAD = 2  # steps that the devices are given before the loss of the first is read
RATE_STEPS = 50  # the last ones, over which their number a second is counted


class NotFiniteError(ArithmeticError):
    """A loss or a weight is NaN or infinite after `step`; `kept` is the step of the last checkpoint, None: none."""

    def __init__(self, what: str, step: int, kept: int | None):
        last = "there is no checkpoint" if kept is None else f"the checkpoint of step {kept} is kept"
        super().__init__(
            f"{what} at step {step}: {last}; a lower learning_rate, a longer warmup or mixed_precision no may help"
        )
        self.step, self.kept = step, kept


class Steps(Protocol):
    """What a step is: see `trainer.Trainer`."""

    def __call__(self, state: Any, batch: Any, key: Array) -> tuple[Any, Mapping[str, Array]]:
        """(the next state, metrics, "loss" among them). The state that is given is overwritten."""

    def placed(self, batch: Any) -> Any:
        """The batch on the devices."""


class Progress(NamedTuple):
    """How far a run is."""

    step: int
    steps: int
    loss: float
    per_second: float | None
    """steps, of the last ones; None: not known yet"""

    @property
    def seconds_left(self) -> float | None:
        """Until the last step."""
        return None if not self.per_second else (self.steps - self.step) / self.per_second


@dataclass(frozen=True)
class Plan:
    """How many steps, and what is done between them.

    Attributes:
        steps: in all.
        checkpointing_steps: between checkpoints.
        validate: what is called with (step, state) after each validation_steps and the last one.
        on_progress: is called after each step whose loss is known.
    """

    steps: int
    checkpointing_steps: int
    validate: Callable[[int, Any], None] | None = None
    validation_steps: int = 1
    on_progress: Callable[[Progress], None] = lambda progress: None

    def validates(self, step: int) -> bool:
        """Whether it does after a step."""
        return self.validate is not None and (step % self.validation_steps == 0 or step == self.steps)


def run(
    trainer: Steps,
    state: Any,
    first: int,
    batches: Callable[[int], Iterator[Any]],
    key: Array,
    plan: Plan,
    checkpoints: Checkpoints,
    log: Log,
    stop: Stop,
) -> Any:
    """The state after all steps, of one that is after `first` of them. batches: (number) -> those from it on.

    Each loss is known to be finite, and so is each number of a state, before a checkpoint of it is written; that of the
    last step is always written.

    Raises NotFiniteError, NotWrittenError where a checkpoint does not fit on the disk, Stopped.
    """
    waiting: collections.deque[tuple[int, Mapping[str, Array]]] = collections.deque()
    times = collections.deque([time.monotonic()], RATE_STEPS)

    def read(most: int) -> None:
        """Waits for the metrics of all steps but the last `most`."""
        while len(waiting) > most:
            step, metrics = waiting.popleft()
            values = {name: float(value) for name, value in metrics.items()}
            log.write(step, values)
            if not math.isfinite(values[LOSS]):
                raise NotFiniteError(f"the loss is {values[LOSS]}", step, _last(checkpoints))
            times.append(time.monotonic())
            plan.on_progress(Progress(step, plan.steps, values[LOSS], _rate(times)))

    def keep(step: int) -> None:
        read(0)
        if not all_finite(state):
            raise NotFiniteError("a weight is not finite", step, _last(checkpoints))
        checkpoints.save(step, state)

    shown = batches(first) if first < plan.steps else iter(())
    ahead = [trainer.placed(next(shown))] if first < plan.steps else []
    for step in range(first + 1, plan.steps + 1):
        state, metrics = trainer(state, ahead.pop(), key)
        if step < plan.steps:
            ahead.append(trainer.placed(next(shown)))
        waiting.append((step, metrics))
        read(AHEAD - 1)
        is_last = step == plan.steps
        if step % plan.checkpointing_steps == 0 or is_last or stop.signum is not None:
            keep(step)
        if stop.signum is not None and not is_last:
            raise Stopped(stop.signum, step, plan.steps, checkpoints.folder)
        if plan.validates(step):
            read(0)
            plan.validate(step, state)
            times.clear()
            times.append(time.monotonic())
    return state


def _last(checkpoints: Checkpoints) -> int | None:
    return max(checkpoints.steps, default=None)


def _rate(times: collections.deque[float]) -> float | None:
    """Steps a second; None of the first, which is compiled."""
    return (len(times) - 2) / (times[-1] - times[1]) if len(times) > 2 else None


def restored(checkpoints: Checkpoints, state: Any, wanted: int | str) -> tuple[Any, int]:
    """(state, step) to go on from: of the checkpoint of a step, or "latest"; the state that is given and 0 where there
    is none. Later checkpoints than that of a step are removed.

    Raises ValueError for a step of which there is none.
    """
    steps = checkpoints.steps
    if wanted != "latest":
        if wanted not in (0, *steps):
            known = ", ".join(map(str, steps)) or "there are none"
            raise ValueError(f"resume_from_checkpoint: no checkpoint of step {wanted}: {known}")
        checkpoints.drop_after(int(wanted))
        step = int(wanted)
    else:
        step = max(steps, default=0)
    if not step:
        return state, 0
    return jax.block_until_ready(checkpoints.restore(step, state)), step
