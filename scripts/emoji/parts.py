"""Training some parts of a model, and reading what was trained."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding
from optax.contrib import MuonDimensionNumbers

from sdjax.runtime import parallel
from sdjax.training import checkpoint
from sdjax.training.loop import Budget, fit
from sdjax.training.step import LossAndMetrics, Params, TrainState, train_step

ModelLoss = Callable[[nnx.Module, dict[str, Any], Array], LossAndMetrics]
"""(model, all the data, key of this step) -> (loss, metrics)"""


def adam(learning_rate: float) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, b2=0.99, weight_decay=1e-2))


def muon(learning_rate: float) -> optax.GradientTransformation:
    """Muon for the matrices of a text encoder's layers, Adam at a tenth of the rate for all else.

    Rare words are learned in fewer steps by it (arXiv:2509.26030).
    """

    def numbers(path: tuple, leaf: Array) -> MuonDimensionNumbers | None:
        is_matrix = leaf.ndim == 2 and "['layers']" in jax.tree_util.keystr(path)
        return MuonDimensionNumbers(0, 1) if is_matrix else None

    by_kind = optax.contrib.muon(
        learning_rate,
        adam_learning_rate=learning_rate / 10,
        adam_b2=0.99,
        muon_weight_dimension_numbers=partial(jax.tree.map_with_path, numbers),
    )
    return optax.chain(optax.clip_by_global_norm(1.0), by_kind)


def fit_parts(
    args: argparse.Namespace,
    stage: str,
    model: nnx.Module,
    parts: list[str] | None,
    loss: ModelLoss,
    optimizer: optax.GradientTransformation,
    data: dict[str, Any],
    *,
    seed: int,
    **options: Any,
) -> None:
    """Trains these parts of a model (None: all) within the budget of the stage: <stage>.npz; options are of `fit`."""
    graphdef, params, frozen = split(model, parts)
    params, frozen = replicated((params, frozen))

    def loss_of_params(params: Params, data: dict[str, Any], key: Array) -> LossAndMetrics:
        return loss(nnx.merge(graphdef, params, data["frozen"]), data, key)

    fit(
        train_step(loss_of_params, optimizer),
        jax.jit(TrainState.create, static_argnums=1)(params, optimizer),
        {**jax.tree.map(jnp.asarray, data), "frozen": frozen},
        jax.random.key(seed),
        budget=Budget(getattr(args, f"{stage}_steps"), getattr(args, f"{stage}_minutes")),
        path=args.work / f"{stage}.npz",
        **options,
    )


def initialised(make: Callable[[], nnx.Module]) -> nnx.Module:
    """A new model, its random values made in one program."""
    return nnx.jit(make)()


def trained(model: nnx.Module, path: Path, parts: list[str] | None = None) -> nnx.Module:
    """The model with the averaged weights of a checkpoint, which has these parts of it (None: all)."""
    graphdef, params, rest = split(model, parts)
    return nnx.merge(graphdef, checkpoint.restore(path, params, "state.ema"), rest)


def save_untrained(
    model: nnx.Module, path: Path, parts: list[str] | None, optimizer: optax.GradientTransformation
) -> None:
    """A checkpoint of a training of these parts that is yet to begin with the model's weights."""
    state = TrainState.create(split(model, parts)[1], optimizer)
    checkpoint.save(path, {"state": state, "seconds": jnp.zeros(())})


def split(model: nnx.Module, parts: list[str] | None) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """A model's structure, the parameters of these attributes (None: all) and the others."""
    return nnx.split(model, lambda path, _: parts is None or path[0] in parts, ...)


def replicated(tree: Any) -> Any:
    """All arrays on every device."""
    return jax.device_put(tree, NamedSharding(parallel.data_mesh(), parallel.REPLICATED))


def over_devices(batch: Any) -> Any:
    """The images of a batch split over all devices, within a compiled function."""
    return jax.lax.with_sharding_constraint(batch, NamedSharding(parallel.data_mesh(), parallel.DATA))
