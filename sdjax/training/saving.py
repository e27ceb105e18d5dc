"""What was trained, in the files of other tools."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from sdjax.checkpoints.folder import torch_layout, write_arrays, write_json
from sdjax.checkpoints.lora import ADAPTER_CONFIG, ADAPTER_METADATA, PEFT_FILE_NAMES
from sdjax.checkpoints.lora_keys import PEFT_PREFIX
from sdjax.pipeline import StableDiffusionPipeline
from sdjax.training.trained import Tree

FORMATS = ("kohya", "diffusers", "peft")
LORA = ".lora."
TEXT_MODEL = "text_model."
WIDTHS = {768: "sd_v1", 1024: "sd_v2", 1280: "sdxl_refiner_v1-0", 2048: "sdxl_base_v1-0"}
"""What kohya calls models, by the width of their text states"""
ARCHITECTURES = {
    "sd_v1": "stable-diffusion-v1/lora",
    "sd_v2": "stable-diffusion-v2-512/lora",
    "sd_v2_v": "stable-diffusion-v2-768-v/lora",
    "sdxl_base_v1-0": "stable-diffusion-xl-v1-base/lora",
}
"""Those of the standard modelspec"""

Layers = Mapping[str, Mapping[str, tuple[int, float]]]
"""{component: {path: (rank, alpha)}}"""


@dataclass(frozen=True)
class Base:
    """The model that a file is for, as its header describes it."""

    version: str
    """as kohya calls it; "" for one of another width than those of Stability AI"""
    prediction_type: str
    prefixes: Mapping[str, str]
    """what kohya's keys begin with, by component"""

    @classmethod
    def of(cls, pipe: StableDiffusionPipeline) -> Self:
        width, prediction_type = pipe.unet.config.cross_attention_dim, pipe.scheduler.config["prediction_type"]
        version = WIDTHS.get(width[0] if isinstance(width, tuple) else width, "")
        is_v = version == "sd_v2" and prediction_type == "v_prediction"
        first = "lora_te1" if pipe.text_encoder_2 is not None else "lora_te"
        prefixes = {"unet": "lora_unet", "text_encoder": first, "text_encoder_2": "lora_te2"}
        return cls(f"{version}_v" if is_v else version, prediction_type, prefixes)

    def header(self, layers: Layers, metadata: Mapping[str, Any]) -> dict[str, str]:
        """kohya's ss_ keys and those of the standard modelspec, and what the run says of itself."""
        [rank, alpha], *others = dict.fromkeys(own for component in layers.values() for own in component.values())
        header = {
            "ss_network_module": "networks.lora",
            "ss_network_dim": rank,
            "ss_network_alpha": alpha,
            **_convolutions(others),
            "ss_base_model_version": self.version,
            "ss_v2": self.version.startswith("sd_v2"),
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": ARCHITECTURES.get(self.version, ""),
            "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
            "modelspec.prediction_type": {"v_prediction": "v"}.get(self.prediction_type, self.prediction_type),
        }
        return {key: value if isinstance(value, str) else str(value) for key, value in {**header, **metadata}.items()}


def _convolutions(others: list[tuple[int, float]]) -> dict[str, str]:
    """How kohya's header has the rank and alpha of convolutions, where they have their own."""
    if not others:
        return {}
    return {"ss_network_args": json.dumps({"conv_dim": others[0][0], "conv_alpha": others[0][1]}, allow_nan=False)}


def by_layer(tree: Tree) -> Iterator[tuple[str, str, dict[str, np.ndarray]]]:
    """(component, path, {down.weight, up.weight, magnitude}) of each layer, float32 in PyTorch's layout."""
    for component, own in tree.items():
        layers: dict[str, dict[str, np.ndarray]] = {}
        for name, value in sorted(own.items()):
            path, _, part = name.partition(LORA)
            layers.setdefault(path, {})[part] = torch_layout(name, np.asarray(jax.device_get(value), np.float32))
        for path, parts in layers.items():
            yield component, path, parts


def save_lora(
    path: Path,
    tree: Tree,
    *,
    base: Base,
    layers: Layers,
    format: str = "kohya",
    dtype: Any = np.float32,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes a LoRA.

    format: "kohya": one file, with metadata (ss_…) in its header, which every tool reads. "diffusers": one file, as
    its `save_lora_weights` writes it. "peft": a folder, as `PeftModel.save_pretrained` writes it; where more than one
    component is trained, a folder for each in it. Of DoRA in kohya's layout, PyTorch diffusers leaves the magnitudes
    out: "diffusers" is for it. dtype: of the factors. Raises OSError where it cannot be written.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: one of {', '.join(FORMATS)}")
    found = [(component, own, _cast(parts, dtype)) for component, own, parts in by_layer(tree)]
    if format == "kohya":
        tensors = {}
        for component, own, parts in found:
            key = f"{base.prefixes[component]}_{own.replace('.', '_')}"
            tensors |= {f"{key}.lora_{name}": value for name, value in parts.items() if name != "magnitude"}
            tensors[f"{key}.alpha"] = np.asarray(layers[component][own][1], dtype)
            if "magnitude" in parts:
                tensors[f"{key}.dora_scale"] = _along_output(parts)
        write_arrays(path, tensors, base.header(layers, metadata or {}))
    elif format == "diffusers":
        tensors, config = {}, {}
        for component, own, parts in found:
            tensors |= {f"{component}.{own}.{name}": value for name, value in _peft(parts).items()}
        for component in tree:
            config |= {f"{component}.{key}": value for key, value in _peft_config(layers[component], tree).items()}
        extra = {key: str(value) for key, value in (metadata or {}).items()}
        write_arrays(
            path, tensors, {ADAPTER_METADATA: json.dumps(config, indent=2, sort_keys=True, allow_nan=False), **extra}
        )
    else:
        for component in tree:
            folder = path / component if len(tree) > 1 else path
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {
                f"{PEFT_PREFIX}{_in_transformers(component, own)}.{name}": value
                for owner, own, parts in found
                if owner == component
                for name, value in _peft(parts).items()
            }
            write_arrays(folder / PEFT_FILE_NAMES[0], tensors)
            write_json(folder / ADAPTER_CONFIG, {"peft_type": "LORA", **_peft_config(layers[component], tree)})


def _cast(parts: Mapping[str, np.ndarray], dtype: Any) -> dict[str, np.ndarray]:
    return {name: value.astype(dtype) for name, value in parts.items()}


def _peft(parts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By PEFT's names."""
    named = {"lora_A.weight": parts["down.weight"], "lora_B.weight": parts["up.weight"]}
    if "magnitude" in parts:
        is_linear = parts["down.weight"].ndim == 2
        named["lora_magnitude_vector"] = parts["magnitude"] if is_linear else _along_output(parts)[None, :, 0]
    return named


def _end(path: str) -> str:
    """The part of a layer's path that all versions of transformers have."""
    return path.removeprefix(TEXT_MODEL)


def _in_transformers(component: str, path: str) -> str:
    """A layer's path in a model of transformers 5, of which those with a projection alone keep the prefix."""
    return _end(path) if component == "text_encoder" else path


def _along_output(parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Magnitudes as [out 1 …], with as many axes as the weight has."""
    return parts["magnitude"].reshape(-1, *(1 for _ in parts["down.weight"].shape[1:]))


def _peft_config(layers: Mapping[str, tuple[int, float]], tree: Tree) -> dict[str, Any]:
    """PEFT's `LoraConfig` of a component: ranks and alphas that not all layers have are listed."""
    rank, alpha = next(iter(layers.values()))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(map(_end, layers)),
        "rank_pattern": {_end(path): own for path, (own, _) in layers.items() if own != rank},
        "alpha_pattern": {_end(path): own for path, (_, own) in layers.items() if own != alpha},
        "use_dora": any(name.endswith("magnitude") for own in tree.values() for name in own),
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
    }
