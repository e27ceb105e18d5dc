"""PyTorch diffusers' sides of `bench.py`: eager, in the better of two memory layouts, and compiled."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from bench_stages import GUIDANCE_SCALE, NEGATIVE_PROMPT, PROMPT, TIMESTEP, Stage, inputs
from diffusers import DiffusionPipeline
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
NETWORKS = {"unet": ("unet",), "vae": ("vae",), "picture": ("unet", "vae")}
"""Those that have a choice of layout, by what is computed"""

ALONE = {"unet": Stage("unet", rounds=1, batch=2), "vae": Stage("vae", rounds=1)}  # where a layout is chosen
TRIALS = {"cpu": 1, "gpu": 5}
COMPILE = {"cpu": {}, "gpu": {"mode": "reduce-overhead"}}
LAYOUT_LIMIT = {"float32": 1e-3, "bfloat16": 1e-1}  # of the error against the contiguous layout, over max |value|


class PyTorch:
    """The pipeline on one device, see `bench_side.Side`. A layout that gives another result is not chosen."""

    def __init__(self, folder: Path, dtype: str, device: str, *, compiled: bool):
        self.versions = {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
        self.versions["threads"] = str(torch.get_num_threads())
        self.device_name = torch.cuda.get_device_name() if device == "gpu" else None
        self._layouts: dict[str, dict[str, float]] = {}
        self._folder, self._trials, self._limit = folder, TRIALS[device], LAYOUT_LIMIT[dtype]
        self._device, self._dtype = "cuda" if device == "gpu" else "cpu", getattr(torch, dtype)
        self._pipe = DiffusionPipeline.from_pretrained(folder, dtype=self._dtype, safety_checker=None)
        self._pipe.to(self._device).set_progress_bar_config(disable=True)
        self._flops: dict[str, int] = {}
        self._compiled = compiled
        if compiled:
            self._pipe.text_encoder.compile(dynamic=False)
            self._pipe.unet.compile(dynamic=False, **COMPILE[device])
            self._pipe.vae.decode = torch.compile(self._pipe.vae.decode, dynamic=False, **COMPILE[device])

    def prepare(self, stage: Stage, arrays: dict[str, np.ndarray], layouts: Any) -> Callable[[], Any]:
        self._layouts |= layouts
        for network in NETWORKS.get(stage.what, ()):
            if network not in self._layouts:
                self._layouts[network] = {"contiguous": 0.0} if self._compiled else self._time_layouts(network)
            self._lay_out(network, min(self._layouts[network], key=self._layouts[network].__getitem__))
        return self._run(stage, arrays)

    def layouts(self, stage: Stage) -> dict[str, dict[str, float]]:
        return {network: self._layouts[network] for network in NETWORKS.get(stage.what, ())}

    def _lay_out(self, network: str, layout: str) -> None:
        getattr(self._pipe, network).to(memory_format=LAYOUTS[layout])

    def _time_layouts(self, network: str) -> dict[str, float]:
        """Seconds of a call by layout. Counts the operations by the way."""
        run = self._run(ALONE[network], inputs(self._folder, ALONE[network]))
        found, reference = {}, None
        for layout in LAYOUTS:
            self._lay_out(network, layout)
            if reference is None:
                with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
                    result = reference = self.array(run())
                self._flops[network] = counter.get_total_flops()
            else:
                result = self.array(run())
            if np.abs(result - reference).max() <= self._limit * np.abs(reference).max():
                found[layout] = min(_seconds(run) for _ in range(self._trials))
        return found

    def _run(self, stage: Stage, arrays: dict[str, np.ndarray]) -> Callable[[], Any]:
        tensors = {name: self._tensor(array) for name, array in arrays.items()}
        run = getattr(self, f"_{stage.what}")(stage, **tensors)

        @torch.inference_mode()
        def waiting() -> Any:
            result = run()
            if self._device == "cuda":
                torch.cuda.synchronize()
            return result

        return waiting

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        tensor = tensor.permute(0, 3, 1, 2).contiguous() if tensor.ndim == 4 else tensor
        return tensor.to(self._device, self._dtype if tensor.is_floating_point() else None)

    def _matmul(self, stage: Stage, a: torch.Tensor, b: torch.Tensor) -> Callable[[], Any]:
        return lambda: a @ b

    def _text_encoder(self, stage: Stage, ids: torch.Tensor) -> Callable[[], Any]:
        return lambda: self._pipe.text_encoder(ids, attention_mask=None)[0]

    def _unet(self, stage: Stage, latents: torch.Tensor, states: torch.Tensor) -> Callable[[], Any]:
        timestep = torch.tensor(TIMESTEP, device=self._device)
        options = {"timestep_cond": None, "cross_attention_kwargs": None, "added_cond_kwargs": None}
        return lambda: self._pipe.unet(latents, timestep, encoder_hidden_states=states, return_dict=False, **options)[
            0
        ]  # spelled as the pipeline spells it, so that it is compiled once

    def _vae(self, stage: Stage, latents: torch.Tensor) -> Callable[[], Any]:
        return lambda: self._pipe.vae.decode(latents, return_dict=False, generator=None)[0]

    def _picture(self, stage: Stage, latents: torch.Tensor) -> Callable[[], Any]:
        options = {"num_inference_steps": stage.steps, "guidance_scale": GUIDANCE_SCALE, "output_type": "np"}
        prompts = {"prompt": PROMPT, "negative_prompt": NEGATIVE_PROMPT, "num_images_per_prompt": stage.batch}
        return lambda: self._pipe(**prompts, **options, latents=latents).images

    def array(self, result: Any) -> np.ndarray:
        if isinstance(result, np.ndarray):
            return result
        result = result.permute(0, 2, 3, 1) if result.ndim == 4 else result
        return result.float().cpu().numpy()

    def flops(self, stage: Stage) -> int | None:
        """Of convolutions and products, twice their multiplications; those of the text encoder are left out."""
        if stage.what == "matmul":
            return 2 * stage.size**3
        if not self._flops.keys() >= set(NETWORKS.get(stage.what, ("nothing",))):
            return None
        unet = stage.unet_calls * (stage.batch if stage.what == "picture" else 1)
        vae = stage.batch if stage.what in ("vae", "picture") else 0
        return unet * self._flops.get("unet", 0) + vae * self._flops.get("vae", 0)

    def device_peak(self, *, reset: bool) -> int | None:
        if self._device == "cpu":
            return None
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
"""An operation that PyTorch's counter does not know"""


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def load(name: str, folder: Path, dtype: str, device: str) -> PyTorch:
    """The side of this name."""
    return PyTorch(folder, dtype, device, compiled=name == "torch.compile")
