"""One training step as a pure function, and the state that it carries."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

Params = Any
Data = Any
LossAndMetrics = tuple[Array, dict[str, Array]]
LossFunction = Callable[[Params, Data, Array], LossAndMetrics]
"""(parameters, all the data, key of this step) -> (loss, metrics). The key decides the batch and all other chance."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a run continues from.

    Attributes:
        step: optimiser steps done, int32.
        params: the trained parameters.
        ema: their exponential moving average.
        opt_state: optax's state.
    """

    step: Array
    params: Params
    ema: Params
    opt_state: optax.OptState

    @classmethod
    def create(cls, params: Params, optimizer: optax.GradientTransformation) -> "TrainState":
        return cls(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params))


EMA_GAMMA = 16.97
"""The averages' spread over the past is then 5 % of the run so far (arXiv:2312.02696, equation 123)."""


def ema_decay(step: Array) -> Array:
    """(1 - 1 / n)^(gamma + 1) at the n-th step, n = step + 1: old weights fade like (t / n)^gamma.

    A power function (arXiv:2312.02696, equation 127): as wide a share of a short run as of a long one, and nothing of
    the initial values is left.
    """
    return (1 - 1 / (step + 1)) ** (EMA_GAMMA + 1)


def train_step(
    loss: LossFunction, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Data, Array, Array], tuple[TrainState, dict[str, Array]]]:
    """One optimiser step as a function (state, data, key, scale) -> (state, metrics).

    The key of a step is fold_in(key, state.step), so a run that was cut in pieces continues bit for bit. `scale`
    multiplies the update: a schedule that follows the clock instead of the step comes in through it.
    """

    def step(state: TrainState, data: Data, key: Array, scale: Array) -> tuple[TrainState, dict[str, Array]]:
        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, metrics), grads = gradient(state.params, data, jax.random.fold_in(key, state.step))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, jax.tree.map(lambda u: scale * u, updates))
        ema = optax.incremental_update(params, state.ema, 1 - ema_decay(state.step))
        return TrainState(state.step + 1, params, ema, opt_state), {"loss": value, **metrics}

    return step
