"""Optimisers by name, and learning rates over a run as diffusers names them."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import Array
from optax.contrib import MuonDimensionNumbers

from sdjax.checkpoints.folder import TABLE

Schedule = Callable[[Array], Array]
"""From the steps that are done to the learning rate"""


def _constant(done: Array) -> Array:
    return jnp.ones_like(done)


def _linear(done: Array) -> Array:
    return 1 - done


def _cosine(done: Array, cycles: float = 0.5) -> Array:
    return 0.5 * (1 + jnp.cos(2 * math.pi * cycles * done))


def _cosine_with_restarts(done: Array, cycles: float = 1) -> Array:
    return jnp.where(done < 1, 0.5 * (1 + jnp.cos(math.pi * ((cycles * done) % 1))), 0)


def _polynomial(done: Array, power: float = 1.0) -> Array:
    return (1 - done) ** power


SCHEDULES = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
}
"""From the share of the steps after the warm-up that are done to that of the learning rate"""
POLYNOMIAL_END = 1e-7


def schedule(
    name: str,
    learning_rate: float,
    *,
    steps: int,
    warmup_steps: int = 0,
    num_cycles: float | None = None,
    power: float = 1.0,
) -> Schedule:
    """The learning rate of each step: linear from 0 over warmup_steps, then by name until `steps`, as diffusers has it.

    constant has no warm-up. num_cycles: of the cosines; None: half a one for `cosine`, one for cosine_with_restarts.
    power: of polynomial, which ends at 1e-7. Raises ValueError for a name that is unknown.
    """
    if name not in SCHEDULES:
        raise ValueError(f"lr_scheduler={name!r}: one of {', '.join(SCHEDULES)}")
    shape, warmup = SCHEDULES[name], 0 if name == "constant" else warmup_steps
    if num_cycles is not None and "cosine" in name:
        shape = partial(shape, cycles=num_cycles)
    least = POLYNOMIAL_END if name == "polynomial" else 0.0
    if name == "polynomial":
        shape = partial(shape, power=power)

    def rate(count: Array) -> Array:
        count = jnp.asarray(count, jnp.float32)
        after = shape(jnp.clip((count - warmup) / max(1, steps - warmup), 0, 1))
        return jnp.where(
            count < warmup, learning_rate * count / max(1, warmup), least + (learning_rate - least) * after
        )

    return rate


def _adamw(rate: Schedule, betas: tuple[float, float], eps: float, decay: float) -> optax.GradientTransformation:
    return optax.adamw(rate, *betas, eps, weight_decay=decay)


def _adafactor(rate: Schedule, betas: tuple[float, float], eps: float, decay: float) -> optax.GradientTransformation:
    """With the rate as it is given, as transformers' with scale_parameter=False and relative_step=False."""
    return optax.adafactor(rate, multiply_by_parameter_scale=False, weight_decay_rate=decay or None)


def _lion(rate: Schedule, betas: tuple[float, float], eps: float, decay: float) -> optax.GradientTransformation:
    return optax.lion(rate, weight_decay=decay)


def _prodigy(rate: Schedule, betas: tuple[float, float], eps: float, decay: float) -> optax.GradientTransformation:
    """It finds the rate by itself: what is given multiplies that, and should be 1."""
    return optax.contrib.prodigy(rate, betas, eps=eps, weight_decay=decay)


def _muon(rate: Schedule, betas: tuple[float, float], eps: float, decay: float) -> optax.GradientTransformation:
    """For matrices; AdamW for all else, tables of embeddings too."""

    def numbers(path: tuple, leaf: Array) -> MuonDimensionNumbers | None:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return MuonDimensionNumbers(0, 1) if leaf.ndim == 2 and name.endswith(".weight") and TABLE not in name else None

    by_leaf = partial(jax.tree.map_with_path, numbers)
    own = {"adam_b1": betas[0], "adam_b2": betas[1], "eps": eps, "weight_decay": decay, "adam_weight_decay": decay}
    return optax.contrib.muon(rate, muon_weight_dimension_numbers=by_leaf, **own)


OPTIMIZERS = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "lion": _lion,
    "prodigy": _prodigy,
    "muon": _muon,
}


def create(
    name: str,
    learning_rate: Schedule | float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    max_grad_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """An optimiser of optax by name, of gradients whose norm over all parameters is clipped to max_grad_norm.

    betas, eps: of those that are kinds of Adam. Raises ValueError for a name that is unknown; there is no 8-bit Adam
    for JAX: Adafactor and Lion take less memory than AdamW.
    """
    if name.lower() not in OPTIMIZERS:
        eight = "; no library has an 8-bit Adam for JAX: adafactor and lion take less memory" if "8" in name else ""
        raise ValueError(f"optimizer={name!r}: one of {', '.join(OPTIMIZERS)}{eight}")
    own = OPTIMIZERS[name.lower()](learning_rate, betas, eps, weight_decay)
    return own if max_grad_norm is None else optax.chain(optax.clip_by_global_norm(max_grad_norm), own)
