"""PyTorch diffusers' sides: eager, in the better of two memory layouts, and compiled."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from stages import LIMITS, NETWORKS, Stage, error, inputs, timed
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from sides import Layouts, Side

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
ALONE = {"unet": Stage("unet", batch=2), "vae": Stage("vae")}  # where a layout is chosen
USED = {"unet": ("unet",), "vae": ("vae",), "vae_encode": ("vae",), "picture": ("unet", "vae")}
"""The networks that have a choice of layout, by stage"""

TRIALS = {"cpu": 1, "gpu": 5}
OPTIONS = {"cpu": {}, "gpu": {"mode": "reduce-overhead"}}  # of torch.compile
CLASSES = {
    "text_encoder": transformers.CLIPTextModel,
    "unet": diffusers.UNet2DConditionModel,
    "vae": diffusers.AutoencoderKL,
}
CALLS: dict[str, Callable[..., torch.Tensor]] = {
    "text_encoder": lambda m, ids: m(ids, attention_mask=None)[0],
    "unet": lambda m, latents, timestep, states, **added: m(
        latents,
        timestep,
        encoder_hidden_states=states,
        timestep_cond=None,
        cross_attention_kwargs=None,
        added_cond_kwargs=added or None,
        return_dict=False,
    )[0],
    "vae": lambda m, latents: m.decode(latents, return_dict=False, generator=None)[0],
    "vae_encode": lambda m, image: m.encode(image).latent_dist.mean,
}
"""Spelled as the pipeline spells them, so that they are compiled once"""


class PyTorch(Side):
    """The pipeline on one device. A layout that gives another result than the usual one is not chosen."""

    def __init__(self, dtype: str, device: str):
        super().__init__(dtype, device)
        self.versions = {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
        self.versions["threads"] = str(torch.get_num_threads())
        self.device_name = torch.cuda.get_device_name() if device == "gpu" else None
        self._target, self._dtype = "cuda" if device == "gpu" else "cpu", getattr(torch, dtype)
        self._trials, self._options, self._limit = TRIALS[device], OPTIONS[device], LIMITS[dtype]

    def load(self, folder: Path, component: str | None) -> int:
        self._folder = folder
        if component:
            self._models = {component: CLASSES[component].from_pretrained(folder / component, dtype=self._dtype)}
        else:
            self.pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=self._dtype, safety_checker=None)
            self.pipe.set_progress_bar_config(disable=True)
            self._models = {name: getattr(self.pipe, name) for name in CLASSES}
        for model in self._models.values():
            model.to(self._target)
        return sum(parameter.numel() for model in self._models.values() for parameter in model.parameters())

    def prepare(self, stage: Stage, arrays: dict[str, np.ndarray], layouts: Layouts) -> Callable[[], Any]:
        self.layouts |= layouts
        for network in USED.get(stage.what, ()):
            self.layouts[network] = self.layouts.get(network) or self._best_layout(network)
            self._lay_out(network, self.layouts[network])
        return self._run(stage, arrays)

    def _lay_out(self, network: str, layout: str) -> None:
        self._models[network].to(memory_format=LAYOUTS[layout])

    def _best_layout(self, network: str) -> str:
        run, seconds, reference = self._run(ALONE[network], inputs(self._folder, ALONE[network])), {}, None
        for layout in LAYOUTS:
            self._lay_out(network, layout)
            result = self.array(run())
            reference = result if reference is None else reference
            if error(result, reference) <= self._limit:
                seconds[layout] = min(timed(run)[0] for _ in range(self._trials))
        return min(seconds, key=seconds.__getitem__)

    def _run(self, stage: Stage, arrays: dict[str, np.ndarray]) -> Callable[[], Any]:
        tensors = {name: self._tensor(array) for name, array in arrays.items()}

        @torch.inference_mode()
        def run() -> Any:
            if stage.what == "picture":
                result = self.picture(stage, **tensors)
            elif stage.what == "matmul":
                result = torch.matmul(*tensors.values())
            else:
                result = CALLS[stage.what](self._models[NETWORKS[stage.what]], **tensors)
            if self._target == "cuda":
                torch.cuda.synchronize()
            return result

        return run

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        tensor = tensor.permute(0, 3, 1, 2).contiguous() if tensor.ndim == 4 else tensor
        return tensor.to(self._target, self._dtype if tensor.is_floating_point() else None)

    def array(self, result: Any) -> np.ndarray:
        if isinstance(result, np.ndarray):
            return result
        return (result.permute(0, 2, 3, 1) if result.ndim == 4 else result).float().cpu().numpy()

    def count(self, run: Callable[[], Any]) -> tuple[Any, int | None]:
        """Of convolutions and products, twice their multiplications."""
        with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
            return run(), counter.get_total_flops()

    def reset_peak(self) -> None:
        if self.device_name:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.device_name else None


class Compiled(PyTorch):
    """By torch.compile, in the layout that the eager side has chosen."""

    def load(self, folder: Path, component: str | None) -> int:
        parameters = super().load(folder, component)
        self._models["text_encoder"].compile(dynamic=False)
        self._models["unet"].compile(dynamic=False, **self._options)
        self._models["vae"].decode = torch.compile(self._models["vae"].decode, dynamic=False, **self._options)
        return parameters

    def _best_layout(self, network: str) -> str:
        return "contiguous"

    def count(self, run: Callable[[], Any]) -> tuple[Any, int | None]:
        return run(), None


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
"""An operation that PyTorch's counter does not know"""
