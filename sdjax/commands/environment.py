"""What the command sets in its environment before JAX starts."""

import os
from pathlib import Path

GOOGLE = "0x1ae0"  # who makes the PCI devices that are TPUs
QUIET = {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost"}
"""Of any kind and name: without them libtpu asks Google's cloud, in vain, and complains on stderr"""


def cache_every_program() -> None:
    """Keeps programs of any compile time in the disk cache, unless the user has set the least."""
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def quiet_libtpu(root: Path = Path("/")) -> None:
    """Where `libtpu` is installed and there is no TPU, it fails in silence; a TPU that is there is found as ever."""
    if not has_tpu(root):
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)


def has_tpu(root: Path = Path("/")) -> bool:
    """Whether there may be a TPU: a device of Google's on the PCI bus, or one of the names that TPUs have."""
    vendors = root.glob("sys/bus/pci/devices/*/vendor")
    names = (*root.glob("dev/accel*"), *root.glob("dev/vfio/[0-9]*"))
    return bool(names) or any(path.read_text().strip() == GOOGLE for path in vendors)
