"""LoRA files (arXiv:2106.09685) in every spelling: changes of low rank to the weights of a model.

kohya:      lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight, .lora_up.weight, .lora_mid.weight, .alpha;
            the module also in the names of the original layout; lora_te_, lora_te1_, lora_te2_: text encoders
PEFT:       unet.down_blocks.0.attentions.0.proj_in.lora_A.weight, .lora_B.weight; text_encoder., text_encoder_2.
diffusers:  ….lora.down.weight, ….lora_linear_layer.down.weight, the oldest ….attn1.processor.to_q_lora.down.weight
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from sdjax.checkpoints import ldm, weights
from sdjax.checkpoints.errors import CheckpointError
from sdjax.checkpoints.folder import read_json

PEFT_FILE_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
FILE_NAMES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", *PEFT_FILE_NAMES)
"""What the file is called in a folder or a repository; PEFT itself calls it the latter"""
ADAPTER_CONFIG = "adapter_config.json"
"""Lies beside a file that PEFT itself wrote"""
ADAPTER_METADATA = "lora_adapter_metadata"  # the same as JSON in the header of a file that diffusers wrote
ADAPTER_FIELDS = ("lora_alpha", "alpha_pattern", "use_rslora")

PART = re.compile(
    r"(?P<module>.+?)(?:\.lora_|[._]lora(?:_linear_layer)?\.)(?P<factor>down|up|mid|A|B)(?:\.\w+)?\.weight"
    r"|(?P<scaled>.+?)(?:[._]lora)?\.alpha"
)
PEFT_FACTORS = {"A": "down", "B": "up"}
PEFT_PREFIX = "base_model.model."
PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lycoris_": "unet",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "diffusion_model.": "unet",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_h.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}
OTHER_SPELLINGS = (
    (r"\.to_out\.0$", ".to_out"),
    (r"\.self_attn\.(q|k|v|out)_proj$", r".self_attn.to_\1"),
    (r"^text_model\.", ""),  # transformers 5 leaves it out
)
ORIGINAL_LAYOUT = re.compile(r"(input_blocks|middle_block|output_blocks)[._]")
DIFFUSERS_LAYOUT = re.compile(r"(down_blocks|mid_block|up_blocks)[._]")

UNSUPPORTED = {
    r"\.hada_": "LoHa layers",
    r"\.lokr_": "LoKr layers",
    r"\.(oft|boft)_": "OFT layers",
    r"\.on_input$": "IA3 layers",
    r"\.[ab][12]\.weight$": "GLoRA layers",
    r"\.dora_scale$|\.lora_magnitude_vector": "DoRA layers",
    r"\.diff(_b)?$|\.[wb]_norm$|\.lora_B(\.\w+)?\.bias$": "whole weights, norms or biases",
    r"\.lora_embedding_|^bundle_emb\.": "embeddings",
    r"^lora_te3_|^(lora_)?transformer[._]|(double|single|joint)_(transformer_)?blocks[._]": "layers of Flux or SD 3",
    r"^lora_controlnet|^lllite_": "layers of a ControlNet",
    r"^model\.diffusion_model\.|^cond_stage_model\.|^conditioner\.": "a whole checkpoint, which is no LoRA",
    r"^string_to_param$|^emb_params$|^clip_[lg]$": "a textual inversion, which is no LoRA",
}
"""What the keys of files that are handed around with LoRAs hold, where it is not a change of low rank"""

CONTEXT_PROJECTION = re.compile(r"attn2[._](?:processor\.)?to_k(?:\.lora_|[._]lora\.)(?:down|A)\..*weight")
FAMILIES = {768: "SD 1", 1024: "SD 2", 1280: "the SDXL refiner", 2048: "SDXL"}
"""By the width of the text states"""
KEYS_SHOWN = 5


@dataclass(frozen=True)
class LoraLayer:
    """The change scale * up @ down of one weight: down [r in] or [r in kh kw], up [out r]."""

    down: np.ndarray
    up: np.ndarray
    scale: float


Layers = dict[str, dict[str, LoraLayer]]
"""{component: {parameter: layer}}, the parameters as PyTorch diffusers and transformers name them"""
Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""{component: {parameter: shape in PyTorch's layout}} of the weights that a LoRA may change"""


class _Misfit(ValueError):
    """What is wrong with one module of a file."""


def read(path: Path, shapes: Shapes, unet_config: Mapping[str, Any]) -> Layers:
    """The layers of a LoRA file, for a model with these weights. unet_config gives the names of the original layout.

    scale = alpha / r. alpha is the file's own, else that of the metadata which diffusers writes, or of the
    `adapter_config.json` beside the file, else r.
    Raises one CheckpointError that lists everything in the file that is not such a change of such a weight.
    """
    tensors = weights.open_tensors(path)
    problems = _unsupported(tensors)
    if problems:
        raise _error(path, tensors, shapes, problems)
    targets, config = _Targets(shapes, unet_config), _adapter_config(path, tensors)
    modules, strangers = _modules(tensors)
    if strangers:
        problems["no keys of a LoRA"] = strangers
    layers: Layers = {}
    for module, keys in modules.items():
        try:
            component, parameter = targets.find(module)
            if parameter in layers.get(component, {}):
                raise _Misfit(f"second change of the same weight of the {component}")
            given = {part: tensors[key] for part, key in keys.items()}
            layer = _layer(given, shapes[component][parameter], component, _scaling(config, component, module))
            layers.setdefault(component, {})[parameter] = layer
        except _Misfit as problem:
            problems.setdefault(str(problem), []).extend(keys.values())
    if problems or not layers:
        raise _error(path, tensors, shapes, problems or {"no LoRA layers": []})
    return layers


def _unsupported(keys: Iterable[str]) -> dict[str, list[str]]:
    """{what they hold: keys} for the keys that belong to no change of low rank."""
    found: dict[str, list[str]] = {}
    for key in keys:
        kind = next((kind for pattern, kind in UNSUPPORTED.items() if re.search(pattern, key)), None)
        if kind:
            found.setdefault(f"not supported: {kind}", []).append(key)
    return found


def _modules(keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """{module as the file spells it: {"down", "up", "mid" or "alpha": key}}, and the keys that are none of these.

    Some files hold the UNet in both layouts: then that of diffusers counts.
    """
    modules: dict[str, dict[str, str]] = {}
    strangers = []
    for key in keys:
        match = PART.fullmatch(key)
        if match:
            part = "alpha" if match["scaled"] else PEFT_FACTORS.get(match["factor"], match["factor"])
            modules.setdefault(match["scaled"] or match["module"], {})[part] = key
        else:
            strangers.append(key)
    original = {module for module in modules if ORIGINAL_LAYOUT.search(module)}
    if any(DIFFUSERS_LAYOUT.search(module) for module in modules.keys() - original):
        modules = {module: parts for module, parts in modules.items() if module not in original}
    return modules, strangers


class _Targets:
    """Finds the weight that a module of a file means, among the spellings of all weights."""

    def __init__(self, shapes: Shapes, unet_config: Mapping[str, Any]):
        self._weights: dict[str, dict[str, str]] = {}
        for component, names in shapes.items():
            spellings = self._weights[component] = {}
            for name in names:
                module = name.removesuffix(".weight")
                others = [re.sub(pattern, new, module) for pattern, new in OTHER_SPELLINGS]
                if component == "unet":
                    others.append(ldm.unet_name(module, unet_config))
                for spelling in (module, *others):
                    spellings.setdefault(_joined(spelling), name)

    def find(self, module: str) -> tuple[str, str]:
        """(component, parameter). Raises _Misfit where there is none."""
        prefix = _prefix(module)
        component, spelling = PREFIXES.get(prefix), _joined(module.removeprefix(prefix))
        if component and component not in self._weights:
            raise _Misfit(f"for the {component}, which this model does not have")
        for candidate in [component] if component else self._weights:
            if spelling in self._weights[candidate]:
                return candidate, self._weights[candidate][spelling]
        raise _Misfit(f"for no weight of the {component or ' or the '.join(self._weights)}")


def _prefix(module: str) -> str:
    return next((prefix for prefix in (*PREFIXES, PEFT_PREFIX) if module.startswith(prefix)), "")


def _joined(module: str) -> str:
    """A module path in kohya's spelling, without the attention processor that diffusers had in it at first."""
    return module.replace(".processor.", ".").replace(".", "_")


def _adapter_config(path: Path, keys: Iterable[str]) -> Mapping[str, Any]:
    """PEFT's `LoraConfig`: from the file's header, where a component's name may stand before each key, or beside it."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(ADAPTER_METADATA)
        try:
            if text:
                return json.loads(text)
        except ValueError as error:
            raise CheckpointError(f"{path}: {ADAPTER_METADATA} in its header is no JSON: {error}") from error
    if any(key.startswith(PEFT_PREFIX) for key in keys):
        if not (path.parent / ADAPTER_CONFIG).is_file():
            raise CheckpointError(f"{path}: PEFT keeps the scale of a LoRA in {ADAPTER_CONFIG}, which is not beside it")
        return read_json(path.parent / ADAPTER_CONFIG)
    return {}


def _scaling(config: Mapping[str, Any], component: str, module: str) -> Callable[[int], float]:
    """The scale of a module that has no alpha of its own, as a function of its rank."""
    name = module.removeprefix(_prefix(module))
    fields = {field: config.get(f"{component}.{field}", config.get(field)) for field in ADAPTER_FIELDS}
    matches = (a for pattern, a in (fields["alpha_pattern"] or {}).items() if re.match(rf"(.*\.)?({pattern})$", name))
    alpha = next(matches, fields["lora_alpha"])
    if alpha is None:
        return lambda rank: 1.0
    return lambda rank: alpha / (rank**0.5 if fields["use_rslora"] else rank)


def _layer(
    given: Mapping[str, np.ndarray], shape: tuple[int, ...], component: str, scaling: Callable[[int], float]
) -> LoraLayer:
    """The change of a weight of this shape. Raises _Misfit for factors that do not give one."""
    missing = [factor for factor in ("down", "up") if factor not in given]
    if missing:
        raise _Misfit(f"incomplete: without {' and '.join(missing)}")
    down, up, alpha = given["down"], given["up"], given.get("alpha")
    if "mid" in given:
        down = _with_mid(given["mid"], down)
    rank = down.shape[0] if down.size else 0
    if not rank or _trimmed(down.shape) != _trimmed((rank, *shape[1:])) or _trimmed(up.shape) != (shape[0], rank):
        raise _Misfit(f"of another shape than the weights of the {component}")
    if not all(np.isfinite(array).all() for array in given.values()) or (alpha is not None and alpha.size != 1):
        raise _Misfit("not finite (NaN or infinity)")
    scale = scaling(rank) if alpha is None else alpha.item() / rank
    # copies: those in the file are views of it
    return LoraLayer(np.array(down.reshape(rank, *shape[1:])), np.array(up.reshape(shape[0], rank)), scale)


def _with_mid(mid: np.ndarray, down: np.ndarray) -> np.ndarray:
    """The convolution down [r in 1 1] followed by mid [s r kh kw], as one: [s in kh kw] (LyCORIS, arXiv:2309.14859)."""
    down = down.reshape(_trimmed(down.shape))
    if mid.ndim != 4 or down.ndim != 2 or mid.shape[1] != down.shape[0]:
        raise _Misfit("misshapen lora_mid")
    return np.einsum("srhw,ri->sihw", mid.astype(np.float32), down.astype(np.float32))


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A linear layer and a convolution of one pixel are the same."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _error(
    path: Path, tensors: Mapping[str, np.ndarray], shapes: Shapes, problems: Mapping[str, list[str]]
) -> CheckpointError:
    lines = [f"{path}: not a LoRA for this model{_families(tensors, shapes)}"]
    for problem, keys in problems.items():
        shown = [f"{key} {list(tensors[key].shape)}" for key in keys[:KEYS_SHOWN]] + ["…"] * (len(keys) > KEYS_SHOWN)
        lines.append(f"{problem}: {len(keys)} keys: {', '.join(shown)}")
    return CheckpointError("\n  ".join(lines))


def _families(tensors: Mapping[str, np.ndarray], shapes: Shapes) -> str:
    """What the widths of the text states say that the file and the model are, where they differ."""
    theirs = {tensors[key].shape[1] for key in tensors if CONTEXT_PROJECTION.search(key)}
    ours = {shape[1] for name, shape in shapes.get("unet", {}).items() if name.endswith("attn2.to_k.weight")}
    if not theirs or theirs <= ours:
        return ""
    file, model = (
        " or ".join(FAMILIES.get(n, "a model") + f" (text states of width {n})" for n in sorted(widths))
        for widths in (theirs, ours)
    )
    return f": it is for {file}, and this is {model}"
