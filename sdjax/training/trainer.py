"""One step of training, compiled: over the devices of a mesh, with the parameters on all of them or split."""

from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sdjax.runtime.parallel import REPLICATED, shard_map
from sdjax.training.distillation import Consistency, ConsistencyDraws
from sdjax.training.objective import Draws, Objective
from sdjax.training.step import TrainState, updated, warmed_up_decay
from sdjax.training.trained import Trained, Tree, joined

AllDraws = Draws | ConsistencyDraws

DATA, FSDP = "data", "fsdp"
SPLIT = PartitionSpec((DATA, FSDP))
"""A batch, over all devices"""
LEAST_SPLIT = 2**14  # numbers in an array below which it is on every device
GATHERED = ("all_gather", "all_gather_invariant")
"""Primitives whose result a gradient computes again in place of keeping it"""


def training_mesh(devices: Any = None, fsdp: int = 1) -> Mesh:
    """The devices in groups of `fsdp`, each of which holds all parameters together; None: all devices.

    Raises ValueError where they cannot be grouped so.
    """
    devices = np.array(devices if devices is not None else jax.devices())
    if devices.size % fsdp:
        raise ValueError(f"{devices.size} devices are no groups of fsdp={fsdp}")
    return Mesh(devices.reshape(-1, fsdp), (DATA, FSDP))


class Trainer:
    """Steps of an optimiser on a loss: `state()`, then `state, metrics = trainer(state, batch, key)` again and again.

    A step is a function of state, batch and key alone. Chance in it is that of fold_in(key, state.step): runs that are
    cut in pieces continue bit for bit, and the number of devices changes nothing but the order of sums.

    accumulation: a batch is taken in so many parts, one after the other, with the memory of one: it has that many times
    the images. Each part's share of a batch has to fill the devices. ema: averages of what is trained are kept, with
    this decay in the end. metrics: loss, and grad_norm before clipping; both stay on the devices until they are read.
    """

    def __init__(
        self,
        trained: Trained,
        objective: Objective | Consistency,
        optimizer: optax.GradientTransformation,
        *,
        mesh: Mesh | None = None,
        accumulation: int = 1,
        ema: float | None = None,
    ):
        self.trained, self.objective, self.optimizer = trained, objective, optimizer
        self.mesh, self.accumulation, self.ema = mesh or training_mesh(), accumulation, ema
        self._shardings = jax.tree.map(self._sharding, jax.eval_shape(self._create, trained.initial))
        self._frozen_specs = jax.tree.map(self._spec, trained.frozen)
        self._step = jax.jit(self._stepped, donate_argnums=0, out_shardings=(self._shardings, None))
        self._loss = jax.jit(self._mean_loss)

    @cached_property
    def frozen(self) -> Tree:
        """What is not trained, on the devices."""
        return jax.device_put(self.trained.frozen, jax.tree.map(self._sharding, self.trained.frozen))

    def state(self) -> TrainState:
        """What a run begins with, on the devices."""
        initial = jax.device_put(self.trained.initial, self._shardings.params)
        return jax.jit(self._create, out_shardings=self._shardings)(initial)

    def __call__(
        self, state: TrainState, batch: Mapping[str, Any], key: Array | AllDraws
    ) -> tuple[TrainState, dict[str, Array]]:
        """(the next state, metrics). The state that is given is overwritten. key: or all draws in its place."""
        return self._step(state, self.frozen, self.placed(batch), key)

    def loss(self, tree: Tree, batch: Mapping[str, Any], key: Array) -> Array:
        """The mean loss of a batch, without a step: tree is the state's params or ema."""
        return self._loss(tree, self.frozen, self.placed(batch), key)

    def lower(self, batch: Any) -> jax.stages.Lowered:
        """The step for a batch, lowered for devices that need not be there: the compiler counts its memory.

        Of the batch and of what is trained and what is not, shapes and dtypes count (`jax.ShapeDtypeStruct`).
        """
        state, frozen = jax.eval_shape(self._create, self.trained.initial), self.trained.frozen
        given = [(state, self._shardings), (frozen, jax.tree.map(self._sharding, frozen))]
        given.append((batch, jax.tree.map(lambda _: NamedSharding(self.mesh, SPLIT), batch)))
        key = jax.eval_shape(partial(jax.random.key, 0))
        return self._step.lower(*(jax.tree.map(_described, *own) for own in given), key)

    def placed(self, batch: Mapping[str, Any]) -> Any:
        """A batch of NumPy's arrays on the devices, split over all of them. To be called ahead, it does not wait.

        Raises ValueError for a number of images that cannot be split so.
        """
        count, parts = len(jax.tree.leaves(batch)[0]), self.mesh.size * self.accumulation
        if count % parts:
            raise ValueError(
                f"a batch of {count} images cannot be split over {self.mesh.size} devices"
                + (f" in {self.accumulation} parts" if self.accumulation > 1 else "")
            )
        return jax.device_put(batch, NamedSharding(self.mesh, SPLIT))

    def _create(self, initial: Tree) -> TrainState:
        return TrainState.create(initial, self.optimizer, with_ema=self.ema is not None)

    def _stepped(self, state: TrainState, frozen: Tree, batch: Any, key: Array | AllDraws) -> Any:
        draws = key if isinstance(key, tuple) else self._draws(batch, jax.random.fold_in(key, state.step))
        loss, grads = self._gradient(state.params, frozen, (batch, draws))
        metrics = {"loss": loss, "grad_norm": jnp.sqrt(sum(jnp.vdot(own, own) for own in jax.tree.leaves(grads)))}
        return updated(state, grads, self.optimizer, partial(warmed_up_decay, highest=self.ema)), metrics

    def _draws(self, batch: Any, key: Array) -> AllDraws:
        draws = self.objective.draws(key, self.trained.latents_shape(batch))
        return jax.lax.with_sharding_constraint(draws, NamedSharding(self.mesh, SPLIT))

    def _gradient(self, params: Tree, frozen: Tree, given: Any) -> tuple[Array, Tree]:
        """The mean loss and its gradient: each device's share of the batch, summed over the devices."""
        specs = jax.tree.map(self._spec, params)

        def own(params: Tree, frozen: Tree, given: Any) -> tuple[Array, Tree]:
            def added(total: tuple[Array, Tree], part: Any) -> tuple[tuple[Array, Tree], None]:
                found = jax.value_and_grad(self._own_loss)(params, frozen, part, specs)
                return jax.tree.map(jnp.add, total, found), None

            nothing = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
            (loss, grads), _ = jax.lax.scan(added, nothing, _in_parts(given, self.accumulation))
            return jax.lax.psum(loss, (DATA, FSDP)), jax.tree.map(_summed, grads, specs)

        in_specs = (specs, self._frozen_specs, SPLIT)
        return shard_map(own, self.mesh, in_specs, (REPLICATED, specs))(params, frozen, given)

    def _own_loss(self, params: Tree, frozen: Tree, given: tuple[Any, AllDraws], specs: Any) -> Array:
        """One device's share of the mean loss of one part of a batch."""

        def loss(params: Tree, frozen: Tree) -> Array:
            cast = jax.tree.map(partial(_cast, dtype=self.trained.dtype), params)
            whole = (jax.tree.map(_gathered, *own) for own in ((frozen, self._frozen_specs), (cast, specs)))
            losses = self.objective.of_batch(self.trained, joined(*whole), *given)
            return losses.mean() / (self.mesh.size * self.accumulation)

        if self.mesh.shape[FSDP] > 1:
            loss = jax.checkpoint(loss, policy=lambda primitive, *_, **__: primitive.name not in GATHERED)
        return loss(params, frozen)

    def _mean_loss(self, params: Tree, frozen: Tree, batch: Any, key: Array) -> Array:
        return self._gradient(params, frozen, (batch, self._draws(batch, key)))[0]

    def _spec(self, leaf: Any) -> PartitionSpec:
        """A parameter, and what an optimiser keeps of it, by its longest axis that can be split."""
        groups = self.mesh.shape[FSDP]
        axes = [axis for axis, size in enumerate(leaf.shape) if size % groups == 0]
        if groups == 1 or not axes or leaf.size < LEAST_SPLIT:
            return REPLICATED
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return PartitionSpec(*(FSDP if axis == longest else None for axis in range(leaf.ndim)))

    def _sharding(self, leaf: Any) -> NamedSharding:
        return NamedSharding(self.mesh, self._spec(leaf))


def _cast(leaf: Array, dtype: Any) -> Array:
    """As networks compute with it. Vectors, which take no memory, stay float32: biases, norms, magnitudes."""
    return leaf.astype(dtype) if leaf.ndim > 1 else leaf


def _gathered(leaf: Array, spec: PartitionSpec) -> Array:
    """The whole of a parameter, of which a device holds a part."""
    return jax.lax.all_gather(leaf, FSDP, axis=[*spec].index(FSDP), tiled=True) if FSDP in [*spec] else leaf


def _summed(grad: Array, spec: PartitionSpec) -> Array:
    """Over the devices; that of a parameter that was gathered is over its group already."""
    return jax.lax.psum(grad, DATA if FSDP in [*spec] else (DATA, FSDP))


def _in_parts(given: Any, parts: int) -> Any:
    """[B …] -> [parts B/parts …]"""
    return jax.tree.map(lambda array: array.reshape(parts, -1, *array.shape[1:]), given)


def _described(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
