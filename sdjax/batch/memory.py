"""How many pictures a device samples at once: what the programs take, by the compiler's count, and what it has."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax

from sdjax import inputs
from sdjax.runtime import bounds, host, lowering
from sdjax.runtime.lowering import is_out_of_memory, power_of_two

if TYPE_CHECKING:
    from sdjax.pipeline import StableDiffusionPipeline
    from sdjax.request import Request

MOST = {"cpu": 8}
MOST_ELSEWHERE = 64
"""Beyond these no device gets faster, and an interruption costs more."""
LITTLE = 8  # pictures that probably fit

HOST_SHARE = 0.5  # of what is available, where the host's memory is the device's: others use it too


def per_device_batch(pipe: "StableDiffusionPipeline", items: Sequence["Request"], most: int) -> int:
    """The largest power of two, up to `most`, at which the programs of all these items fit each device.

    items: one of each shape. Programs are compiled to ask them: at `most` where that is little, else for one picture
    and then for the number that follows from it. Those that the job will run are not compiled again.
    """
    device = pipe.mesh.devices.flat[0]
    most = power_of_two(min(most, MOST.get(device.platform, MOST_ELSEWHERE)))
    by_size = sorted(items, key=lambda item: math.prod(item.size) * (1 + item.is_guided))
    largest = {
        (item.cache_interval is None, item.vae_tiling, item.noise): item for item in by_size
    }  # of each set of programs

    def wanted(batch: int) -> float:
        return max(needed(pipe, item, batch) for item in largest.values())

    limit = device_memory(pipe)
    if most == 1 or (most <= LITTLE and wanted(most) <= limit):
        return most
    weights = weight_bytes(pipe)
    batch = min(most, power_of_two((limit - weights) // max(1, wanted(1) - weights)))
    while batch > 1 and wanted(batch) > limit:
        batch //= 2
    return batch


def needed(pipe: "StableDiffusionPipeline", item: "Request", batch: int) -> float:
    """Bytes on each device for batches of so many pictures of this item: weights + max over programs of the rest.

    Infinite where the compiler finds that it cannot fit.
    """
    try:
        working = max(
            program.working_bytes(program.lowered.compile())
            for program in _programs(pipe, item, batch * pipe.mesh.size)
        )
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return math.inf
    return weight_bytes(pipe) + working


def weight_bytes(pipe: "StableDiffusionPipeline") -> int:
    """Bytes of all parameters, which are on each device."""
    return lowering.size_in_bytes(pipe.params)


def device_memory(pipe: "StableDiffusionPipeline") -> int:
    """Bytes that each device of the pipeline may use; on CPUs its part of a share of the host's."""
    own = math.inf if bounds.is_host(pipe.mesh) else bounds.device_bytes(pipe.mesh)
    return int(lowering.SHARE * own) if own < math.inf else int(HOST_SHARE * host.available()) // pipe.mesh.size


def _programs(pipe: "StableDiffusionPipeline", item: "Request", rows: int) -> list[lowering.LoweredProgram]:
    """The programs that take most, for so many rows on all devices."""
    networks = {name: pipe.network(name) for name in pipe.models}  # before anything is traced
    described = jax.eval_shape(lambda: inputs.prepare(pipe, [item]))

    def of_rows(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: lowering.split(pipe.mesh, (rows, *leaf.shape[1:]), leaf.dtype), tree)

    forms = described.forms(of_rows) | {"keeps_features": item.cache_interval is not None, "tiled": item.vae_tiling}
    latents = (rows, *described.parts[0].shape[1:])
    return lowering.lower(pipe.mesh, networks, of_rows(described.branches), latents, **forms)
