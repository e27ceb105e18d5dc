"""What is installed beside JAX: versions, and what JAX would ignore, to run on the CPU in silence."""

import platform
import re
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from sdjax.commands.environment import has_tpu

PACKAGES = ("sdjax", "jax", "jaxlib", "flax", "numpy", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
PLUGINS = {"tpu": {"libtpu": "tpu"}, "gpu": {"jax-cuda12-plugin": "cuda12", "jax-cuda13-plugin": "cuda13"}}
"""JAX's platform: the packages that it needs one of, each with the extra of jax that it comes with"""
NVIDIA = Path("/proc/driver/nvidia/version")


def versions() -> dict[str, str]:
    """Of Python and of those PACKAGES that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def unused(found: Mapping[str, str], platforms: Collection[str]) -> list[str]:
    """Warnings, a line each, of a TPU or GPU of this machine that JAX does not use, and why that may be.

    found: of `versions`. platforms: of JAX's devices.
    """
    there = {"tpu": has_tpu(), "gpu": NVIDIA.exists()}
    return [_advice(found, platform) for platform in there if there[platform] and platform not in platforms]


def _advice(found: Mapping[str, str], platform: str) -> str:
    own = {name: extra for name, extra in PLUGINS[platform].items() if name in found}
    extra = next(iter((own or PLUGINS[platform]).values()))
    why = "".join(f"{name} {found[name]} is installed, and {_wanted(name, own[name])} goes with it; " for name in own)
    advice = f'{why}pip install "jax[{extra}]=={found["jax"]}"'
    return f"jax {found['jax']} does not use this machine's {platform.upper()}: {advice}"


def _wanted(name: str, extra: str) -> str | None:
    """The version of a package that JAX's extra asks for: the latest it allows; None: it asks for none."""
    for line in requires("jax") or ():
        if re.match(rf"{name}\b", line) and re.search(rf"""extra == ["']{extra}["']""", line):
            found = re.search(r"(?:==|<=)\s*([0-9.]*[0-9])", line)
            return found and found[1]
    return None
