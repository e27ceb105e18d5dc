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
        ema: their exponential moving average; None: it is not kept.
        opt_state: optax's state.
    """

    step: Array
    params: Params
    ema: Params
    opt_state: optax.OptState

    @classmethod
    def create(cls, params: Params, optimizer: optax.GradientTransformation, *, with_ema: bool = True) -> "TrainState":
        ema = jax.tree.map(jnp.copy, params) if with_ema else None
        return cls(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))


EMA_GAMMA = 16.97
"""The averages' spread over the past is then 5 % of the run so far (arXiv:2312.02696, equation 123)."""


def ema_decay(step: Array) -> Array:
    """(1 - 1 / n)^(gamma + 1) at the n-th step, n = step + 1: old weights fade like (t / n)^gamma.

    A power function (arXiv:2312.02696, equation 127): as wide a share of a short run as of a long one, and nothing of
    the initial values is left.
    """
    return (1 - 1 / (step + 1)) ** (EMA_GAMMA + 1)


def warmed_up_decay(step: Array, highest: float = 0.9999) -> Array:
    """min(highest, 1 - (1 + step)^(-2/3)): 0 at the first step, as diffusers' `EMAModel` with use_ema_warmup."""
    return jnp.minimum(highest, 1 - (1.0 + step) ** (-2 / 3))


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
        return updated(state, grads, optimizer, ema_decay, scale), {"loss": value, **metrics}

    return step


def updated(
    state: TrainState,
    grads: Params,
    optimizer: optax.GradientTransformation,
    decay: Callable[[Array], Array],
    scale: Array | float = 1.0,
) -> TrainState:
    """The state after a step with these gradients. decay: of the averages, if they are kept, by the steps before it."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, jax.tree.map(lambda u: scale * u, updates))
    ema = state.ema
    if ema is not None:
        ema = optax.incremental_update(params, ema, 1 - decay(state.step))
    return TrainState(state.step + 1, params, ema, opt_state)
