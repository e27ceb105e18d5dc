"""The kinds of change that LoRA files hold: from the tensors of a module to the changes of its weight and bias.

For a weight W in PyTorch's layout [out in …] and a scale s; products sum over ranks, * is by element:

LoRA       s up down                                         arXiv:2106.09685
  with mid  s up mid down: convolutions in a row              arXiv:2309.14859, as are t1 and t2 below
LoHa       s (w1_a w1_b) * (w2_a w2_b)                       arXiv:2108.06098
LoKr       s kron(w1, w2), each of them whole or a product    arXiv:2309.14859
GLoRA      s (W a1 a2 + b1 b2)                               arXiv:2306.07967
IA3        W * weight, by input or by output                  arXiv:2205.05638
OFT, BOFT  R W - W, R orthogonal                              arXiv:2306.07280, arXiv:2311.06243
full       diff itself; diff_b, and w_norm and b_norm of normalisations
DoRA       m (W + D) / |W + D| - W for a change D of another kind, m by output or by input: arXiv:2402.09353
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Change = Callable[[np.ndarray], np.ndarray]
"""From a parameter, float32 in PyTorch's layout, to what is added to it, float32 of the same shape; NumPy's or JAX's"""
Parts = Mapping[str, np.ndarray]
Shape = tuple[int, ...]
Scaling = Callable[[int | None], float]
"""From the rank, None for a change that is no product of low rank, to the scale"""

EPSILON = np.finfo(np.float32).eps


class Misfit(ValueError):
    """What is wrong with one module of a file."""


@partial(jax.tree_util.register_dataclass, data_fields=("down", "up"), meta_fields=("scale",))
@dataclass(frozen=True)
class LowRank:
    """The change scale * up @ down of one weight: down [r in] or [r in kh kw], up [out r]. A pytree of down and up."""

    down: np.ndarray
    up: np.ndarray
    scale: float

    def __call__(self, weight: np.ndarray) -> np.ndarray:
        """Of this weight, on which it does not depend."""
        return self.scale * _product(self.up, self.down)


def low_rank(parts: Parts, shape: Shape, scaling: Scaling) -> LowRank:
    """LoRA. Raises Misfit, as all of these, for parts that give no change of a parameter of this shape."""
    _need(parts, "down", "up")
    up, down = _factors(parts["up"], parts["down"], parts.get("mid"), shape)
    return LowRank(down, up, scaling(len(down)))


def hadamard(parts: Parts, shape: Shape, scaling: Scaling) -> Change:
    """LoHa."""
    first, second = (_pair(parts, stem, shape) for stem in ("hada_w1", "hada_w2"))
    scale = scaling(len(first[1]))
    return lambda weight: scale * _product(*first) * _product(*second)


def kronecker(parts: Parts, shape: Shape, scaling: Scaling) -> Change:
    """LoKr."""
    rows, columns = (parts.get("lokr_w1", parts.get(f"lokr_w1_{factor}")) for factor in "ab")
    if rows is None or columns is None or rows.ndim != 2 or columns.ndim != 2:
        raise Misfit("incomplete: without a matrix lokr_w1, or lokr_w1_a and lokr_w1_b")
    outer = len(rows), columns.shape[1]
    if any(not n or size % n for size, n in zip(shape, outer, strict=False)):
        raise Misfit(MISSHAPEN)
    inner = shape[0] // outer[0], shape[1] // outer[1], *shape[2:]
    first, second = _matrix(parts, "lokr_w1", outer), _matrix(parts, "lokr_w2", inner)
    ranks = [len(parts[key]) for key in ("lokr_w1_b", "lokr_w2_b") if key in parts]
    scale = scaling(ranks[-1] if ranks else None)
    return lambda weight: scale * np.kron(first().reshape(*outer, *(1 for _ in shape[2:])), second())


def generalised(parts: Parts, shape: Shape, scaling: Scaling) -> Change:
    """GLoRA."""
    _need(parts, *GLORA)
    a1, a2, b1, b2 = (parts[key] for key in GLORA)
    if (len(a1), len(b1)) != (shape[1], shape[0]):  # LyCORIS of 2023 numbered the factors the other way round
        a1, a2, b1, b2 = a2, a1, b2, b1
    first, second = _factors(a1, a2, None, (shape[1], shape[1])), _factors(b1, b2, None, shape)
    scale = scaling(len(second[1]))

    def change(weight: np.ndarray) -> np.ndarray:
        xp, (a1, a2) = namespace(weight), map(_wide, first)
        return scale * (xp.moveaxis(xp.moveaxis(weight, 1, -1) @ a1 @ a2, -1, 1) + _product(*second))

    return change


def rescaled(parts: Parts, shape: Shape, scaling: Scaling) -> Change:
    """IA3."""
    _need(parts, "weight", "on_input")
    factors = _along(parts["weight"], 1 if parts["on_input"].any() else 0, shape)
    return lambda weight: weight * _wide(factors)


def rotated(parts: Parts, shape: Shape, scaling: Scaling) -> Change:
    """OFT: Q, skew-symmetric, gives R = (I + Q) (I - Q)^-1 in blocks along the output. BOFT: stages of such blocks.

    Its alpha is no scale: the norm of Q is at most alpha times the number of outputs.
    """
    _need(parts, "oft_blocks")
    blocks, rows = parts["oft_blocks"], shape[0]
    *stages, count, size, other = blocks.shape if blocks.ndim in (3, 4) else (0, 0, 0)
    if stages and stages[0] > rows.bit_length():
        raise Misfit(MISSHAPEN)
    mixed = [size << stage for stage in range(*stages)] if stages else []  # rows that each stage mixes
    if size != other or count * size != rows or size * len(mixed) % 2 or any(rows % number for number in mixed):
        raise Misfit(MISSHAPEN)
    rescale = _along(parts.get("rescale", np.ones(rows)), 0, shape)
    limit = float(parts["alpha"].item()) * rows if "alpha" in parts else 0.0

    def change(weight: np.ndarray) -> np.ndarray:
        rotations = _rotations(_wide(blocks), limit)
        turned = weight.reshape(rows, -1)
        if not stages:
            turned = rotations.transpose(0, 2, 1) @ turned.reshape(count, size, -1)
        for number, rotation in zip(mixed, rotations, strict=False):
            order = np.arange(rows).reshape(-1, 2, number // 2).transpose(0, 2, 1).ravel()
            turned = (rotation @ turned[order].reshape(count, size, -1)).reshape(rows, -1)[np.argsort(order)]
        return turned.reshape(shape) * _wide(rescale) - weight

    return change


def whole(key: str, parts: Parts, shape: Shape, scaling: Scaling) -> Change:
    """A change that is given as it is."""
    if _trimmed(parts[key].shape) != _trimmed(shape):
        raise Misfit(MISSHAPEN)
    return lambda weight: _wide(parts[key]).reshape(shape)


def bias_of_up(parts: Parts, shape: Shape, scaling: Scaling) -> Change:
    """The bias of LoRA's second layer (PEFT's `lora_bias`)."""
    _need(parts, "up")
    change, scale = whole("up_bias", parts, shape, scaling), scaling(parts["up"].shape[1])
    return lambda bias: scale * change(bias)


def decomposed(change: Change, parts: Parts, shape: Shape) -> Change:
    """DoRA on another change.

    `dora_scale` of LyCORIS is [out 1 …] or [1 in …]; PEFT's magnitudes are always of the outputs.
    """
    given = parts.get("lora_magnitude_vector", parts.get("dora_scale"))
    by_input = "dora_scale" in parts and given.ndim > 1 and len(given) == 1 < given.size
    magnitude = _along(given, 1 if by_input else 0, shape)
    others = tuple(axis for axis in range(len(shape)) if axis != by_input)

    def changed(weight: np.ndarray) -> np.ndarray:
        merged = weight + change(weight)
        xp = namespace(merged)
        norm = xp.sqrt(xp.square(merged).sum(axis=others, keepdims=True))
        return merged * (_wide(magnitude) / xp.maximum(norm, EPSILON)) - weight

    return changed


class Kind(NamedTuple):
    """A kind of change: of the weight or the bias of a module, the parts that it can have, how they give the change."""

    leaf: str
    parts: tuple[str, ...]
    change: Callable[[Parts, Shape, Scaling], Change]


LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
GLORA = ("a1", "a2", "b1", "b2")
KINDS = (
    Kind("weight", ("down", "up", "mid"), low_rank),
    Kind("weight", ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"), hadamard),
    Kind("weight", LOKR, kronecker),
    Kind("weight", GLORA, generalised),
    Kind("weight", ("weight", "on_input"), rescaled),
    Kind("weight", ("oft_blocks", "rescale"), rotated),
    Kind("weight", ("diff",), partial(whole, "diff")),
    Kind("weight", ("w_norm",), partial(whole, "w_norm")),
    Kind("bias", ("diff_b",), partial(whole, "diff_b")),
    Kind("bias", ("b_norm",), partial(whole, "b_norm")),
    Kind("bias", ("up_bias",), bias_of_up),
)
MAGNITUDES = ("dora_scale", "lora_magnitude_vector")
PARTS = ("alpha", *MAGNITUDES, *(part for kind in KINDS for part in kind.parts))
"""All that a module of a file can have"""
MISSHAPEN = "of another shape than the weight"
NOT_FINITE = "not finite (NaN or infinity)"


def changes(parts: Parts, shapes: Mapping[str, Shape], scaling: Scaling) -> dict[str, Change]:
    """{"weight" or "bias": its change} of a module with parameters of these shapes.

    parts: the tensors of the module in the file, by the names in PARTS. Raises Misfit for what gives no change of them.
    """
    if "alpha" in parts and parts["alpha"].size != 1:
        raise Misfit("an alpha that is not one number")
    found: dict[str, Change] = {}
    for leaf, own, change in KINDS:
        if parts.keys().isdisjoint(own):
            continue
        if leaf not in shapes:
            raise Misfit(f"for a {leaf} that the layer does not have")
        if leaf in found:
            raise Misfit(f"two changes of one {leaf}")
        if leaf == "weight" and len(shapes[leaf]) < 2 and own not in (("diff",), ("w_norm",)):
            raise Misfit("a change of a matrix for a vector")
        found[leaf] = change(parts, shapes[leaf], scaling)
    if not parts.keys().isdisjoint(MAGNITUDES) and "weight" in found:
        found["weight"] = decomposed(found["weight"], parts, shapes["weight"])
    if not found:
        raise Misfit(f"incomplete: nothing but {' and '.join(parts)}")
    return found


def _need(parts: Parts, *keys: str) -> None:
    if missing := [key for key in keys if key not in parts]:
        raise Misfit(f"incomplete: without {' and '.join(missing)}")


def _factors(up: np.ndarray, down: np.ndarray, core: np.ndarray | None, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """up [out r] and down [r in …] of a product of this shape; a core [s r …] after down makes that [s in …]."""
    if core is not None:
        down = down.reshape(_trimmed(down.shape))
        made = (len(core) if core.ndim else 0, *down.shape[1:], *core.shape[2:])
        fits = core.ndim == 4 and down.ndim == 2 and core.shape[1] == len(down) and made[1:] == shape[1:]
        if not fits or _trimmed(up.shape) != (shape[0], made[0]):
            raise Misfit(MISSHAPEN)
        down = np.einsum("srhw,ri->sihw", _wide(core), _wide(down))
    rank = len(down) if down.size and down.ndim > 1 else 0
    wanted = (rank, *shape[1:])
    fits = _trimmed(down.shape) in (_trimmed(wanted), (rank, math.prod(shape[1:])))
    if not rank or not fits or _trimmed(up.shape) != (shape[0], rank):
        raise Misfit(MISSHAPEN)
    return up.reshape(shape[0], rank), down.reshape(wanted)


def _pair(parts: Parts, stem: str, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """The factors that LyCORIS calls <stem>_a and <stem>_b; with a core, t1 or t2, it has a as [r out]."""
    _need(parts, f"{stem}_a", f"{stem}_b")
    core = parts.get(stem.replace("_w", "_t"))
    up = parts[f"{stem}_a"]
    return _factors(up if core is None else up.T, parts[f"{stem}_b"], core, shape)


def _matrix(parts: Parts, stem: str, shape: Shape) -> Callable[[], np.ndarray]:
    """A factor of LoKr, whole or a product, as a function that makes it."""
    if stem not in parts:
        return partial(_product, *_pair(parts, stem, shape))
    if _trimmed(parts[stem].shape) not in (_trimmed(shape), (shape[0], math.prod(shape[1:]))):
        raise Misfit(MISSHAPEN)
    return lambda: _wide(parts[stem]).reshape(shape)


def _product(up: np.ndarray, down: np.ndarray) -> np.ndarray:
    product = _wide(up) @ _wide(down).reshape(len(down), -1)
    return product.reshape(len(up), *down.shape[1:])


def _rotations(blocks: np.ndarray, limit: float) -> np.ndarray:
    """The Cayley transform of [… n n], all of them scaled to a norm of at most limit; 0: to none."""
    skew = blocks - np.swapaxes(blocks, -1, -2)
    norm = np.linalg.norm(skew)
    if 0 < limit < norm:
        skew = skew * np.float32(limit / norm)
    identity = np.eye(skew.shape[-1], dtype=np.float32)
    return (identity + skew) @ np.linalg.inv(identity - skew)


def _along(values: np.ndarray, axis: int, shape: Shape) -> np.ndarray:
    """One value for each output (axis 0) or input (1) of a weight, to be multiplied with it."""
    if axis >= len(shape) or values.size != shape[axis]:
        raise Misfit(MISSHAPEN)
    return values.reshape([-1 if i == axis else 1 for i in range(len(shape))])


def _trimmed(shape: Shape) -> Shape:
    """A linear layer and a convolution of one pixel are the same."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def namespace(*arrays: Any) -> ModuleType:
    """NumPy, or `jax.numpy` where one of the arrays is JAX's."""
    return jnp if any(isinstance(array, jax.Array) for array in arrays) else np


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32)
