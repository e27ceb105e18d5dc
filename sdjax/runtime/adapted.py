"""Parameters with low-rank adaptation (arXiv:2106.09685) and its kin: what is merged once, and what is trained."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from sdjax.checkpoints.folder import TO_FLAX, TO_TORCH, flax_layout, torch_layout
from sdjax.checkpoints.lora_kinds import Change, LowRank, namespace

T = TypeVar("T", bound=np.ndarray | Array)

Factors = Mapping[str, Mapping[str, Change]]
"""{LoRA: {parameter: its change}}"""


def adapted(
    params: Mapping[str, Array], factors: Factors, weights: Mapping[str, ArrayLike] | None = None
) -> dict[str, Array]:
    """params with W = W_0 + sum_i w_i D_i(W_0) for each parameter W_0 of which a LoRA i has a change D_i.

    The sum is taken in float32 and cast once to the parameter's dtype. weights: 1 where they are not given. A function
    of arrays alone, to be jitted and differentiated: with respect to `params`, `weights` and, since `LowRank` is a
    pytree of its factors, to `factors`. Raises KeyError for a change of a parameter that is not in params.
    """
    found: dict[str, list[tuple[ArrayLike, Change]]] = {}
    for lora, changes in factors.items():
        for name, change in changes.items():
            found.setdefault(name, []).append(((weights or {}).get(lora, 1.0), change))
    return {
        **params,
        **{name: summed(name, params[name], own).astype(params[name].dtype) for name, own in found.items()},
    }


def summed(name: str, first: T, weighted: Sequence[tuple[ArrayLike, Change]]) -> T:
    """first + sum_i w_i D_i(first) of a parameter, float32: those of low rank as one product, others one by one."""
    low_rank = [(weight, change) for weight, change in weighted if isinstance(change, LowRank)]
    others = [(weight, change) for weight, change in weighted if not isinstance(change, LowRank)]
    value = torch_layout(name, first.astype(np.float32))
    base = value.copy() if others else value
    if low_rank:
        value += _stacked(low_rank)  # in place, where these are arrays of NumPy
    for weight, change in others:
        value += namespace(weight).float32(weight) * change(base)
    return flax_layout(name, value)


def _stacked(weighted: Sequence[tuple[ArrayLike, LowRank]]) -> np.ndarray | Array:
    """sum_i w_i s_i up_i down_i as one product of the stacked factors: [out in] or [out in kh kw], float32.

    In memory it lies as the kernels of Flax do.
    """
    xp = namespace(*jax.tree.leaves(weighted))
    downs = [weight * change.scale * change.down.astype(np.float32) for weight, change in weighted]
    ups = [change.up.astype(np.float32) for _, change in weighted]
    down = xp.concatenate(downs)
    product = down.transpose(TO_FLAX[down.ndim]) @ xp.concatenate(ups, axis=1).T
    return product.transpose(TO_TORCH[product.ndim])
