"""How many pictures a device samples at once: what the compiler says the programs take, against what the device has."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from sdjax import conditioning, denoise, programs
from sdjax.parallel import DATA
from sdjax.samplers import Table
from sdjax.text import Side

if TYPE_CHECKING:
    from sdjax.batch.job import Item
    from sdjax.pipeline import StableDiffusionPipeline

MOST = {"cpu": 8}
MOST_ELSEWHERE = 64
"""Beyond these no device gets faster, and an interruption costs more."""
LITTLE = 8  # pictures that probably fit

SHARE = 0.9  # of a device's memory: some is lost between the allocations
HOST_SHARE = 0.5  # of what is available, where the host's memory is the device's: others use it too
AHEAD = 2  # calls of which arrays are on a device: one is computed, the next waits


def per_device_batch(pipe: "StableDiffusionPipeline", items: Sequence["Item"], most: int) -> int:
    """The largest power of two, up to `most`, at which the programs of all these items fit each device.

    items: one of each shape. Programs are compiled to ask them: at `most` where that is little, else for one picture
    and then for the number that follows from it. Those that the job will run are not compiled again.
    """
    device = pipe.mesh.devices.flat[0]
    most = power_of_two(min(most, MOST.get(device.platform, MOST_ELSEWHERE)))
    item = max(items, key=lambda item: item.width * item.height * (1 + (item.guidance_scale > 1)))
    limit = device_memory(pipe)
    if most == 1 or (most <= LITTLE and needed(pipe, item, most) <= limit):
        return most
    weights = weight_bytes(pipe)
    batch = min(most, power_of_two((limit - weights) // max(1, needed(pipe, item, 1) - weights)))
    while batch > 1 and needed(pipe, item, batch) > limit:
        batch //= 2
    return batch


def needed(pipe: "StableDiffusionPipeline", item: "Item", batch: int) -> float:
    """Bytes on each device for batches of so many pictures of this item: weights + max over programs of the rest.

    Infinite where the compiler finds that it cannot fit.
    """
    try:
        working = max(_working(*program) for program in _programs(pipe, item, batch * pipe.mesh.size))
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return math.inf
    return weight_bytes(pipe) + working


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the compiler for it, ran out of memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def power_of_two(number: float) -> int:
    """The largest power of two up to a number, at least 1."""
    return 2 ** (max(1, int(number)).bit_length() - 1)


def weight_bytes(pipe: "StableDiffusionPipeline") -> int:
    """Bytes of all parameters, which are on each device."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(pipe.params))


def device_memory(pipe: "StableDiffusionPipeline") -> int:
    """Bytes that each device of the pipeline may use; on CPUs its part of a share of the host's."""
    devices = list(pipe.mesh.devices.flat)
    limits = [stats["bytes_limit"] for device in devices if "bytes_limit" in (stats := device.memory_stats() or {})]
    if len(limits) == len(devices):
        return int(SHARE * min(limits))
    return int(HOST_SHARE * _available()) // len(devices)


def _programs(pipe: "StableDiffusionPipeline", item: "Item", rows: int) -> list[tuple[Any, Any]]:
    """(lowered, parameters) of the programs that take most, for so many rows on all devices."""
    mesh = pipe.mesh
    networks = {name: pipe._network(name) for name in pipe.models}  # before anything is traced

    def split(*shape: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=NamedSharding(mesh, DATA))

    shape = pipe._latent_shape(item.height, item.width)
    scales = np.full(rows, item.guidance_scale, np.float32)
    sides = [Side("prompt", item.prompt, None, None, None)]
    if item.guidance_scale > 1 and conditioning.is_guided(pipe.unet.config):
        sides.insert(0, Side("negative_prompt", item.negative_prompt, None, None, None))
    told = jax.eval_shape(lambda: pipe._conditions(sides, pipe._reading(item.clip_skip), 1, scales, shape, {}))
    conditions = jax.tree.map(lambda leaf: split(*leaf.shape[1:], dtype=leaf.dtype), told)
    latents = split(*shape)
    state = denoise.State(latents, latents, split(denoise.REMEMBERED, *shape))
    table = Table.stack([pipe.scheduler.table(item.num_inference_steps)] * rows)
    length = programs.SEGMENT_ROWS
    segment = next(denoise.segments(table, length, length)).rows
    keys, guidance = split(2, dtype=np.uint32), (split(), split())
    step = programs.denoise_segment.lower(mesh, *networks["unet"], state, latents, segment, keys, conditions, guidance)
    lowered = [(step, networks["unet"]), (programs.decode.lower(mesh, *networks["vae"], latents), networks["vae"])]
    if "safety_checker" in networks:
        pictures = split(item.height, item.width, 3)
        checked = programs.check.lower(mesh, *networks["safety_checker"], pictures)
        lowered.append((checked, networks["safety_checker"]))
    return [(program, params) for program, (_, params) in lowered]


def _working(lowered: Any, params: Sequence[jax.Array]) -> int:
    """Bytes that a program takes on a device beside the parameters, its arguments and results as often as they wait."""
    stats = lowered.compile().memory_analysis()
    moved = stats.argument_size_in_bytes - sum(leaf.nbytes for leaf in params) + stats.output_size_in_bytes
    return stats.temp_size_in_bytes + AHEAD * max(0, moved)


def _available() -> int:
    """Bytes of memory that a process can still have on this host, and in its control group if that is limited."""
    known = [int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:")]
    limits = [int(line) for line in _lines("/sys/fs/cgroup/memory.max") if line.isdigit()]
    used = [int(line) for line in _lines("/sys/fs/cgroup/memory.current")]
    free = [limit - use for limit, use in zip(limits, used, strict=False)]
    return min(known + free, default=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
