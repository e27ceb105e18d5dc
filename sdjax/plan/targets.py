"""TPUs to compile for: their chips, and the devices of a topology that is not there."""

import importlib.util
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax import Device

GiB = 2**30

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # a TPU that is there, and that another process may use, is left alone
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # programs for devices that are not there cannot be read from it
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # beside a process that uses a TPU, or plans
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # of any kind: without it, and a name of the host, libtpu complains
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""What has to be set before jax starts."""


@dataclass(frozen=True)
class Chip:
    """hbm: bytes that programs may use, from the compiler's report of no space; bandwidth: of the HBM, bytes/s; peak:
    bfloat16 FLOP/s. Bandwidth and peak from cloud.google.com/tpu/docs/<chip>."""

    hbm: float
    bandwidth: float
    peak: float
    axes: int
    """of its topologies"""


CHIPS = {
    "v5e": Chip(15.75 * GiB, 819e9, 197e12, axes=2),
    "v5p": Chip(95.74 * GiB, 2765e9, 459e12, axes=3),
    "v6e": Chip(31.25 * GiB, 1640e9, 918e12, axes=2),
}


def parse_topology(text: str) -> tuple[str, tuple[int, ...]]:
    """'v5e:2x4' -> ('v5e', (2, 4)). Raises ValueError for another chip, or no shape of its topologies."""
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        raise ValueError(f"--topology {text}: no chip {name!r}; known: {', '.join(CHIPS)}")
    axes = CHIPS[name].axes
    if not re.fullmatch("x".join([r"[1-9]\d{0,2}"] * axes), shape):
        example = "x".join(["2"] * axes)
        raise ValueError(f"--topology {text}: a {name} has {axes} axes, such as {name}:{example}")
    return name, tuple(map(int, shape.split("x")))


def check_compiler() -> None:
    """Raises ValueError where there is no compiler for TPUs."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError('planning needs the compiler of TPUs: pip install "sdjax[plan]"')


def devices(name: str, shape: tuple[int, ...]) -> "list[Device]":
    """The devices of a topology, to compile for; nothing can be computed on them. Raises ValueError for none such."""
    import jax
    from jax.experimental import topologies

    bounds = [*shape, *[1] * (3 - len(shape))]  # one host: what is on a device is the same on any number of hosts
    topology = f"{name}:{'x'.join(map(str, shape))}"
    try:
        return topologies.get_topology_desc(topology, "tpu", chips_per_host_bounds=bounds).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--topology {topology}: {error}") from error
