"""What a notebook runs on, and how long a picture takes there."""

import time
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sdjax import inputs
from sdjax.request import Request
from sdjax.runtime import lowering

if TYPE_CHECKING:
    from sdjax.pipeline import StableDiffusionPipeline

SIDE = 2048  # of the matrices whose product is timed


def runs_on(pipe: "StableDiffusionPipeline", **request: Any) -> str:
    """One line: the devices of a pipeline; without a TPU or GPU also how long a picture takes, see `seconds`.

    request: fields of `Request`, such as num_inference_steps.
    """
    if {device.platform for device in pipe.mesh.devices.flat} != {"cpu"}:
        return f"Runs on {pipe.device_kinds}."
    wanted = Request(**{"prompt": "", **request})
    height, width = inputs.request_size(pipe, wanted)
    takes = f"{width}x{height} in {wanted.num_inference_steps} steps takes about {duration(seconds(pipe, wanted))}"
    return (
        f"There is no TPU and no GPU: this runs on {pipe.device_kinds}. "
        f"A picture of {takes}, the first one longer (compiling)."
    )


def seconds(pipe: "StableDiffusionPipeline", request: Request) -> float:
    """How long a picture takes that is made alone: its operations, by the speed of a product of matrices of the UNet's
    dtype. An estimate: nothing is compiled but the text encoder and that product."""
    dtype = jax.tree.leaves(pipe.network("unet")[1])[0].dtype
    return flops(pipe, request) * pipe.mesh.size / _flops_per_second(dtype)  # devices share the cores of one CPU


def flops(pipe: "StableDiffusionPipeline", request: Request) -> float:
    """The floating point operations of a picture on each device, as XLA counts them before it optimises."""
    prepared = inputs.prepare(pipe, [request], inputs.NOTHING)
    networks = {name: pipe.network(name) for name in pipe.models}
    forms = {"keeps_features": False} | prepared.forms()
    programs = lowering.lower(pipe.mesh, networks, prepared.branches, prepared.parts[0].shape, **forms)
    runs = {"denoise": len(prepared.table)}  # of the loop over the table's rows one is counted
    return sum(runs.get(own.name, 1) * own.lowered.cost_analysis()["flops"] for own in programs)


def _flops_per_second(dtype: DTypeLike) -> float:
    matrix = jnp.ones((SIDE, SIDE), dtype)
    product = jax.jit(jnp.dot).lower(matrix, matrix).compile()
    product(matrix, matrix).block_until_ready()
    begun = time.perf_counter()
    product(matrix, matrix).block_until_ready()
    return 2 * SIDE**3 / (time.perf_counter() - begun)


def duration(seconds: float) -> str:
    """1.2 s, 25 s, 3 min, 2.5 h"""
    if seconds < 99.5:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.2g} min" if seconds < 5970 else f"{seconds / 3600:.2g} h"
