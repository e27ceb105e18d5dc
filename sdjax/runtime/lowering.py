"""The programs of a pipeline, lowered for arrays that are only described, to ask the compiler what they take."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from sdjax import sampling
from sdjax.runtime import programs
from sdjax.runtime.denoiser import composed
from sdjax.runtime.network import Graph, Params
from sdjax.runtime.parallel import DATA
from sdjax.sampling import Table, loop
from sdjax.text.conditioning import Condition

SHARE = 0.9  # of a device's memory: some is lost between the allocations
AHEAD = 2  # calls of which arrays are on a device: one is computed, the next waits


class DoesNotFit(ValueError):
    """Pictures or a program need more memory than a device has."""


class LoweredProgram(NamedTuple):
    """A program of `sdjax.runtime.programs`, lowered, and the parameters that are among its arguments."""

    name: str
    lowered: jax.stages.Lowered
    params: Any
    """a pytree"""

    def working_bytes(self, compiled: jax.stages.Compiled) -> int:
        """What it takes on a device beside the parameters, its arguments and results as often as they wait."""
        stats = compiled.memory_analysis()
        moved = stats.argument_size_in_bytes - size_in_bytes(self.params) + stats.output_size_in_bytes
        return stats.temp_size_in_bytes + stats.generated_code_size_in_bytes + AHEAD * max(0, moved)

    def peak_bytes(self) -> float:
        """What one run takes on a device, parameters and all. Infinite where the compiler finds that it cannot fit."""
        try:
            stats = self.lowered.compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return math.inf
        moved = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
        return stats.temp_size_in_bytes + moved


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, the host, or the compiler ran out of memory, or was about to."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory"))
    return isinstance(error, DoesNotFit | MemoryError)


def power_of_two(number: float) -> int:
    """The largest power of two up to a number, at least 1."""
    return 2 ** (max(1, int(number)).bit_length() - 1)


def size_in_bytes(params: Any) -> int:
    """Of the arrays of a pytree, on each device that has them all."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def split(mesh: Mesh, shape: Sequence[int], dtype: np.typing.DTypeLike = np.float32) -> jax.ShapeDtypeStruct:
    """An array of which each device has its share of the first axis."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=NamedSharding(mesh, DATA))


def lower(
    mesh: Mesh,
    networks: Mapping[str, tuple[Graph, Params]],
    conditions: Sequence[Condition],
    latents: tuple[int, ...],
    *,
    keeps_features: bool,
    tiled: bool = False,
    beside: Mapping[str, Sequence[int]] = MappingProxyType({}),
    perpendicular: Any = None,
    mimic: Any = None,
    known: Any = None,
    channels: Any = None,
    control: Any = None,
    original: Any = None,
) -> list[LoweredProgram]:
    """The programs between the text encoders and the pictures, for latents [B h w C] of all devices together.

    networks: by component. conditions: what the UNet is conditioned on,
    for each side, described by `split`. keeps_features: whether deep features of the UNet are kept from row to row.
    tiled: whether pictures are decoded in tiles. beside: columns beside those of the table, and the axes that each has
    after row and image. perpendicular, mimic, known, channels, control, original: as the programs take them, described
    by `split`.
    """
    rows, denoiser = latents[0], composed(networks)
    lowered = []
    x, branches = split(mesh, latents), len(conditions)
    state = loop.State(x, x, split(mesh, (rows, loop.REMEMBERED, *latents[1:])))
    table = Table.stack([sampling.from_config("ddim").table(1)] * rows)  # of any sampler: the shapes are the same
    segment = next(loop.segments(table, programs.SEGMENT_ROWS, programs.SEGMENT_ROWS)).rows
    for name, axes in beside.items():
        segment[1][name] = jax.ShapeDtypeStruct((programs.SEGMENT_ROWS, rows, *axes), np.float32)
    if keeps_features:
        first = jax.eval_shape(lambda: loop.first_row(segment[1]))
        features = programs.deep_features.lower(mesh, *denoiser, x, first, tuple(conditions), channels, control)
        lowered.append(LoweredProgram("deep_features", features, denoiser[1]))
        deep = jax.tree.map(lambda leaf: split(mesh, leaf.shape, leaf.dtype), features.out_info)
        conditions = [side | {"deep": own} for side, own in zip(conditions, deep, strict=True)]
    keys = split(mesh, (rows, 2), np.uint32)
    guidance = (split(mesh, (rows, branches)), split(mesh, (rows,)), perpendicular, mimic) if branches > 1 else ()
    arguments = (state, x, segment, keys, tuple(conditions), guidance, known, channels, control)
    lowered.append(LoweredProgram("denoise", programs.denoise_segment.lower(mesh, *denoiser, *arguments), denoiser[1]))
    decode = programs.decode.lower(mesh, *networks["vae"], x, original, tiled=tiled)
    lowered.append(LoweredProgram("decode", decode, networks["vae"][1]))
    if "safety_checker" in networks:
        pictures, not_finite, _ = (split(mesh, info.shape, info.dtype) for info in decode.out_info)
        check = programs.check.lower(mesh, *networks["safety_checker"], pictures, not_finite)
        lowered.append(LoweredProgram("check", check, networks["safety_checker"][1]))
    return lowered
