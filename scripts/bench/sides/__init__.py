"""The implementations that are compared: `SIDES`, each imported only in the process that runs it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
from stages import PICTURE, Stage, inputs, timed

WARM_UPS = {"cpu": 0, "gpu": 1, "tpu": 1}  # calls after the first; CUDA graphs are recorded in the second


@dataclass(frozen=True)
class Entry:
    """A class of `Side`, the devices that it runs on, what it computes (all stages if empty)."""

    implementation: str
    devices: tuple[str, ...]
    stages: tuple[str, ...] = ()
    is_peer: bool = False
    """whether it needs a Python of its own"""


SIDES = {
    "sdjax": Entry("sides.sdjax:Sdjax", ("cpu", "gpu", "tpu")),
    "pytorch": Entry("sides.pytorch:PyTorch", ("cpu", "gpu")),
    "torch.compile": Entry("sides.pytorch:Compiled", ("cpu", "gpu")),
    "flax-0.35": Entry("sides.flax035:Flax", ("cpu",), stages=("unet",), is_peer=True),
}
REFERENCE = "pytorch"

Layouts = dict[str, str]
"""The memory layout of a network, by its name"""


class Side:
    """An implementation in one dtype on one device."""

    versions: dict[str, str]
    device_name: str | None = None
    """None: it is the host's processor"""
    pipe: Any

    def __init__(self, dtype: str, device: str):
        self.layouts: Layouts = {}

    def load(self, folder: Path, component: str | None) -> int:
        """The pipeline, or one component of it, from a folder; returns the number of parameters."""
        raise NotImplementedError

    def prepare(self, stage: Stage, arrays: dict[str, np.ndarray], layouts: Layouts) -> Callable[[], Any]:
        """A function that computes the stage and returns when the result is there. layouts: chosen by another side."""
        raise NotImplementedError

    def array(self, result: Any) -> np.ndarray:
        """A result as float32, NHWC."""
        return np.asarray(result, np.float32)

    def count(self, run: Callable[[], Any]) -> tuple[Any, int | None]:
        """The result, and the floating-point operations of its products if this side can count them."""
        return run(), None

    def reset_peak(self) -> None:
        """Lets `peak` begin again, where that is possible."""

    def peak(self) -> int | None:
        """The most bytes that were in use on the device; None: it is the host's memory."""
        return None

    def picture(self, stage: Stage, latents: Any) -> np.ndarray:
        """Whole pictures, with guidance."""
        sizes = {"num_inference_steps": stage.steps, "num_images_per_prompt": stage.batch}
        return self.pipe(**PICTURE, **sizes, latents=latents).images


class Running:
    """The side of this process: started, loaded, then prepared for a stage and measured."""

    def start(self, side: str, dtype: str, device: str) -> dict[str, Any]:
        self._side, self._device = resolve_name(SIDES[side].implementation)(dtype, device), device
        return {"versions": self._side.versions, "device_name": self._side.device_name}

    def load(self, folder: str, component: str | None = None) -> int:
        self._folder = Path(folder)
        return self._side.load(self._folder, component)

    def prepare(self, stage: dict[str, Any], out: str, layouts: Layouts) -> dict[str, Any]:
        """Compiles, warms up, and writes the result to the file `out`."""
        side, stage = self._side, Stage(**stage)
        self._run = side.prepare(stage, inputs(self._folder, stage), layouts)
        first, (result, flops) = timed(lambda: side.count(self._run))
        np.save(out, side.array(result))
        del result
        for _ in range(WARM_UPS[self._device]):
            self._run()
        return {"first": first, "flops": flops, "layouts": side.layouts}

    def measure(self) -> dict[str, Any]:
        """Seconds of one call, and the peak of the device's memory."""
        self._side.reset_peak()
        seconds, _ = timed(self._run)
        return {"seconds": seconds, "device_peak": self._side.peak()}


running = Running()
