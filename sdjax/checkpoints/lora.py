"""LoRA files and their kin in every spelling: changes of the weights of a model."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.checkpoints import lora_keys, lora_kinds, lora_numbered, pickles, weights
from sdjax.checkpoints.content import format_of
from sdjax.checkpoints.errors import CheckpointError
from sdjax.checkpoints.folder import read_json
from sdjax.checkpoints.lora_kinds import MISSHAPEN, NOT_FINITE, Change, Misfit
from sdjax.checkpoints.lora_scale import FIELDS, scaling
from sdjax.fields import brief, checked

PEFT_FILE_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
FILE_NAMES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", *PEFT_FILE_NAMES)
"""What the file is called in a folder or a repository; PEFT itself calls it the latter"""
ADAPTER_CONFIG = "adapter_config.json"
"""Lies beside a file that PEFT itself wrote"""
ADAPTER_METADATA = "lora_adapter_metadata"  # the same as JSON in the header of a file that diffusers wrote
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq")
"""Ways of PEFT to start that take the first LoRA away from the weights"""

CONTEXT_PROJECTION = re.compile(
    r"attn2[._](?:processor\.)?to_k(?:(?:\.lora_|[._]lora\.)(?:down|A)\..*weight|\.hada_w1_b|\.diff)"
)
FAMILIES = {768: "SD 1", 1024: "SD 2", 1280: "the SDXL refiner", 2048: "SDXL"}
"""By the width of the text states"""
KEYS_SHOWN = 5

Layers = dict[str, dict[str, Change]]
"""{component: {parameter: its change}}, the parameters as PyTorch diffusers and transformers name them"""
Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""{component: {parameter: shape in PyTorch's layout}} of the parameters that a LoRA may change"""


def read(path: Path, shapes: Shapes, unet_config: Mapping[str, Any]) -> Layers:
    """The changes in a LoRA file, for a model with these weights. unet_config gives the names of the original layout.

    The kinds are those of `lora_kinds`, of which a file can have several; scale = alpha / r. alpha is the file's own,
    else that of the metadata which diffusers writes, or of the `adapter_config.json` beside the file, else r.
    Raises one CheckpointError that lists everything in the file that is no such change.
    """
    tensors = _open_tensors(path)
    if problems := lora_keys.unsupported(tensors):
        raise _error(path, tensors, shapes, problems)
    config = _adapter_config(path, tensors)
    _check_start(path, config)
    try:
        modules, strangers = (
            lora_numbered.modules(tensors, shapes)
            if lora_numbered.is_numbered(tensors)
            else lora_keys.modules(tensors.keys())
        )
    except Misfit as problem:
        raise _error(path, tensors, shapes, {str(problem): list(tensors)}) from None
    if strangers:
        problems["no keys of a LoRA"] = strangers
    known = lora_keys.Layers(shapes, unet_config)
    layers: Layers = {}
    for module, keys in modules.items():
        try:
            component, layer = known.find(module)
            parts = {part: np.array(tensors[key]) for part, key in keys.items()}  # copies: those are views of the file
            with np.errstate(over="ignore"):
                if not all(np.isfinite(np.float32(array)).all() for part, array in parts.items() if part != "alpha"):
                    raise Misfit(NOT_FINITE)
            names = {leaf: f"{layer}.{leaf}" for leaf in ("weight", "bias")}
            own = {leaf: shapes[component][name] for leaf, name in names.items() if name in shapes[component]}
            scale = scaling(config, component, lora_keys.without_prefix(module)[1], parts.get("alpha"))
            for leaf, change in lora_kinds.changes(parts, own, scale).items():
                if names[leaf] in layers.setdefault(component, {}):
                    raise Misfit(f"second change of the same {leaf} of the {component}")
                layers[component][names[leaf]] = change
        except (LookupError, TypeError, ValueError) as problem:
            what = str(problem) if isinstance(problem, Misfit) else MISSHAPEN
            problems.setdefault(what, []).extend(keys.values())
    if problems or not layers:
        raise _error(path, tensors, shapes, problems or {"no LoRA layers": []})
    return layers


def _open_tensors(path: Path) -> Mapping[str, np.ndarray]:
    """The tensors of a file, those of a list numbered."""
    if format_of(path) == "pickle" and isinstance(value := pickles.load(path), list):
        return lora_numbered.named([tensor for tensor in value if isinstance(tensor, np.ndarray) and tensor.size])
    return weights.open_tensors(path)


def _adapter_config(path: Path, keys: Iterable[str]) -> Mapping[str, Any]:
    """PEFT's `LoraConfig`: from the file's header, where a component's name may stand before each key, or beside it."""
    text = weights.read_metadata(path).get(ADAPTER_METADATA)
    source, config = f"{path}: {ADAPTER_METADATA} in its header", {}
    if text:
        try:
            config = checked("value", json.loads(text), dict[str, Any])
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{source} is no JSON object: {error}") from error
    elif any(key.startswith(lora_keys.PEFT_PREFIX) for key in keys):
        source = path.parent / ADAPTER_CONFIG
        if not source.is_file():
            raise CheckpointError(f"{path}: PEFT keeps the scale of a LoRA in {ADAPTER_CONFIG}, which is not beside it")
        config = read_json(source)
    try:
        return {key: checked(key, value, FIELDS.get(key.rpartition(".")[2], Any)) for key, value in config.items()}
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None


def _check_start(path: Path, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a LoRA that is the change of other weights than the model has."""
    for key, start in config.items():
        if key.endswith("init_lora_weights") and brief(start).lower().strip("'").startswith(CHANGES_THE_BASE):
            raise CheckpointError(
                f"{path}: made with init_lora_weights={brief(start)}, which changes the weights before training; let "
                "PEFT save it with path_initial_model_for_weight_conversion, as a LoRA of the model as published"
            )


def _error(
    path: Path, tensors: Mapping[str, np.ndarray], shapes: Shapes, problems: Mapping[str, list[str]]
) -> CheckpointError:
    lines = [f"{path}: not a LoRA for this model{_families(tensors, shapes)}"]
    for problem, keys in problems.items():
        shown = [f"{key} {list(tensors[key].shape)}" for key in keys[:KEYS_SHOWN]] + ["…"] * (len(keys) > KEYS_SHOWN)
        lines.append(f"{problem}: {len(keys)} keys: {', '.join(shown)}")
    return CheckpointError("\n  ".join(lines))


def _families(tensors: Mapping[str, np.ndarray], shapes: Shapes) -> str:
    """The families of the file and of the model by the widths of their text states, where they differ."""
    theirs = {tensors[key].shape[1] for key in tensors if CONTEXT_PROJECTION.search(key) and tensors[key].ndim > 1}
    ours = {shape[1] for name, shape in shapes.get("unet", {}).items() if name.endswith("attn2.to_k.weight")}
    if not theirs or theirs <= ours:
        return ""
    file, model = (
        " or ".join(FAMILIES.get(n, "a model") + f" (text states of width {n})" for n in sorted(widths))
        for widths in (theirs, ours)
    )
    return f": it is for {file}, and this is {model}"
