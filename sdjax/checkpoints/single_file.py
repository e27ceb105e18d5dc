"""Checkpoints in one file, in the layout of the original repositories: SD 1, SD 2, SDXL, or one model of these."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.checkpoints import configs, families, ldm, prediction, taesd, unsupported, weights
from sdjax.checkpoints.errors import CheckpointError

Tensors = Mapping[str, np.ndarray]
PREFIXES = {
    "model.diffusion_model.": "unet",
    "control_model.": "controlnet",
    "first_stage_model.": "vae",
    "vae.": "vae",
    "cond_stage_model.transformer.": "text_encoder",
    "cond_stage_model.model.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.0.model.": "text_encoder_2",
    "conditioner.embedders.1.model.": "text_encoder_2",
}
SGM_PREFIX, POOLED_TEXT = "conditioner.embedders.0.model.", "model.diffusion_model.label_emb.0.0.weight"
BARE = (
    (r"(?:controlnet_cond_embedding|input_hint_block)\.", "controlnet"),
    (r"(?:adapter\.)?body\.\d+\.(?:(?:body|resnets)\.\d+\.)?block1\.", "adapter"),
    (r"(?:model\.1\.sub\.0\.RDB1|RRDB_trunk\.0\.RDB1|body\.0\.rdb1)\.", "upscaler"),
    (r"(?:input_blocks|down_blocks)\.", "unet"),
    (r"encoder\.(?:down|down_blocks)\.", "vae"),
    (r"(?:text_model\.)?embeddings\.token_embedding\.", "text_encoder"),
    (r"(?:encoder|decoder)\.layers\.\d+\.", "vae"),
)
"""(pattern of a key, component) of files that hold one model, with no prefix."""

IGNORED = re.compile(
    r"^(?:model_ema|denoiser|embedding_manager|loss|first_stage_model\.(?:loss|model_ema))\."
    r"|^(?:betas|\w*alphas_cumprod(?:_prev)?|posterior_\w+|logvar|lvlb_weights|scale_factor|v_pred|ztsnr)$"
    r"|^(?:cond_stage_model|conditioner\.embedders\.\d)\.text_projection$"
    r"|(?:^|\.)(?:position_ids|logit_scale|attn_mask)$"
    r"|^lora_controlnet$"
)
"""Keys of a training's state, of constants, and of parameters that no picture depends on."""

LAYOUTS = {
    "unet": ("input_blocks.0.0.weight", ldm.read_unet_table),
    "controlnet": ("input_hint_block.0.weight", ldm.read_controlnet_table),
    "adapter": ("body.1.block1.weight|body.1.in_conv.weight", ldm.read_adapter_table),
    "vae": ("encoder.norm_out.weight", ldm.read_vae_table),
    "text_encoder": ("ln_final.weight", ldm.read_open_clip_table),
    "text_encoder_2": ("ln_final.weight", ldm.read_open_clip_table),
}
"""Component -> (names that only the original layout has, of which one is there, the reader of its table)."""

PENULTIMATE = r"text_model\.encoder\.layers\.(?:2[3-9]|[3-9]\d)\.|text_projection\."
"""What is left out of the first text encoder: SD 2 reads the state before the last of 24 layers."""

CONTROL_LORA = "lora_controlnet"
"""The name of a tensor that says so"""
AVERAGED = "shuffle"
"""In the name of a ControlNet whose residuals are averaged, which its tensors do not say"""
VELOCITY_SPREAD = 0.09
TITLES = ("modelspec.title", "modelspec.architecture")
"""What a header may call the model"""


@dataclass(frozen=True)
class Component:
    """A model: its config as the diffusers folder would have it, and its (name, array) pairs in PyTorch's layout."""

    config: dict[str, Any]
    tensors: Callable[[], Iterator[tuple[str, np.ndarray]]]
    is_change: bool = False
    """of a ControlNet, whether it is a Control-LoRA, see `ControlNetModel.from_control_lora`"""


@dataclass(frozen=True)
class SingleFile:
    """What a file holds, in the terms of a diffusers folder.

    model_index, scheduler: contents of model_index.json and scheduler_config.json; empty for a file without a UNet.
    components: "unet", "vae", "text_encoder", "text_encoder_2", "controlnet", "adapter": those in the file. missing:
    those that its pipeline needs beside them. tokenizers: "tokenizer", "tokenizer_2" -> padding token; all have CLIP's
    vocabulary.
    scaling_factor: of the latents that the UNet works on; None without a UNet.
    """

    path: Path
    model_index: dict[str, Any]
    scheduler: dict[str, Any]
    components: dict[str, Component]
    missing: tuple[str, ...]
    tokenizers: dict[str, str]
    scaling_factor: float | None


class Part(Mapping[str, np.ndarray]):
    """The tensors of one model under diffusers' names, each read on first use.

    keys: name -> (original name, key in the file). original: whether the layout is.
    """

    def __init__(self, tensors: Tensors, keys: Mapping[str, tuple[str, str]], *, original: bool):
        self._tensors, self._keys, self.original = tensors, keys, original

    def __getitem__(self, name: str) -> np.ndarray:
        original, key = self._keys[name]
        return ldm.value(name, original, self._tensors[key]) if self.original else self._tensors[key]

    def __contains__(self, name: object) -> bool:
        return name in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def without(self, pattern: str) -> "Part":
        """Those whose names do not start with a match of the pattern."""
        keys = {name: key for name, key in self._keys.items() if not re.match(pattern, name)}
        return Part(self._tensors, keys, original=self.original)


def read(path: Path, prediction_type: str | None = None) -> SingleFile:
    """Reads the names and shapes of a file; its tensors are read by the components' `tensors`.

    The configs are inferred from names and shapes (see configs.py for what these leave open). A VAE alone has no
    `scaling_factor` in its config: SD's and SDXL's are of the same shape, so its pipeline decides.

    prediction_type, if it is not given (epsilon, v_prediction, sample), is what the header of the file states, or the
    .yaml beside it (see prediction.py). Else it is v_prediction where the file has a key `v_pred` (with `ztsnr`: to
    zero terminal SNR), and for a UNet of SD 2 with 4 channels whose last transformer's first norm has biases of a
    standard deviation above 0.09. Those of 768-v have, those of 512-base have not, and ComfyUI tells them apart by the
    same number. Else it is epsilon.

    The scheduler is that of the family, or of the distilled model that the UNet, the name of the file or the title in
    its header declares it (see families.py).

    Raises CheckpointError for a family or kind of file that is not supported, by its name; for a file that holds
    nothing known; and one for all keys that belong to no component. ValueError for another prediction_type.
    """
    prediction.check(prediction_type)
    tensors = taesd.joined(path, weights.open_tensors(path))
    unsupported.refuse(path, tensors)
    try:
        return _read(path, tensors, prediction_type)
    except CheckpointError:
        raise
    except (LookupError, ValueError) as error:  # from shapes that such tensors never have
        raise CheckpointError(
            f"{path}: no Stable Diffusion checkpoint: its tensors have other shapes: {error}"
        ) from error


def is_control_lora(path: Path) -> bool:
    """Whether a file holds a Control-LoRA. Raises CheckpointError for one that cannot be read."""
    return CONTROL_LORA in weights.open_tensors(path)


def _read(path: Path, tensors: Tensors, prediction_type: str | None) -> SingleFile:
    parts = _parts(path, tensors)
    known = CONFIGS | ({"controlnet": configs.control_lora} if CONTROL_LORA in tensors else {})
    models = {name: _config(path, name, part, known) for name, part in parts.items()}
    if "controlnet" in models:
        models["controlnet"]["global_pool_conditions"] = AVERAGED in path.stem.lower()
    index, scheduler, tokenizers, missing, scaling_factor = {}, {}, {}, ("unet",), None
    if unet := models.get("unet"):
        pooled_width = models.get("text_encoder_2", {}).get("projection_dim")
        family = families.recognised(unet, pooled_width)
        metadata = weights.read_metadata(path)
        distilled = families.distilled(family, unet, [path.stem, *(metadata.get(name, "") for name in TITLES)])
        prediction_type = (
            prediction_type
            or prediction.stated(path, metadata)
            or ("v_prediction" if "v_pred" in tensors else distilled.get("prediction_type"))
            or ("v_prediction" if family is families.SD2 and _looks_like_velocity(parts["unet"], unet) else "epsilon")
        )
        models |= families.completed(family, models, prediction_type)
        scheduler = families.scheduler(family, distilled, prediction_type, zero_snr="ztsnr" in tensors)
        index = families.model_index(family, unet["in_channels"], scheduler["_class_name"], source=path)
        tokenizers = dict(family.tokenizers)
        missing = tuple(name for name in family.components if name not in models)
        scaling_factor = family.scaling_factor
    components = {
        name: Component(models[name], partial(iter, part.items()), is_change=CONTROL_LORA in tensors)
        for name, part in parts.items()
    }
    return SingleFile(path, index, scheduler, components, missing, tokenizers, scaling_factor)


def _looks_like_velocity(unet: Tensors, config: Mapping[str, Any]) -> bool:
    last = len(config["up_block_types"]) - 1
    block = f"up_blocks.{last}.attentions.{ldm.counts(unet)[f'up_blocks.{last}.attentions.'] - 1}"
    bias = unet.get(f"{block}.transformer_blocks.0.norm1.bias")
    return config["in_channels"] == 4 and bias is not None and np.std(bias.astype(np.float64)) > VELOCITY_SPREAD


def _parts(path: Path, tensors: Tensors) -> dict[str, Part]:
    keys = [key for key in tensors if not IGNORED.search(key)]
    grouped, unknown = _grouped(keys, _bare(tensors, keys), pooled_text=POOLED_TEXT in tensors)
    if not grouped:
        shown = ", ".join(keys[:5])
        raise CheckpointError(f"{path}: no UNet, VAE or text encoder among its {len(keys)} tensors: {shown} …")
    parts = {}
    for component, names in grouped.items():
        parts[component], strange = _part(component, names, tensors)
        unknown += strange
    if unknown:
        raise CheckpointError(f"{path}: {len(unknown)} tensors of no known component:\n  " + "\n  ".join(unknown))
    return parts


def _bare(tensors: Tensors, keys: list[str]) -> str | None:
    """The component of a file that holds one model without a prefix. OpenCLIP with its projection is SDXL's second."""
    if any(key.startswith(tuple(PREFIXES)) for key in keys):
        return None
    component = next((component for pattern, component in BARE if any(re.match(pattern, key) for key in keys)), None)
    projection = tensors.get("text_projection.weight") if component == "text_encoder" else None
    wide = projection is not None and projection.shape[1] > configs.QUICK_GELU_WIDTH
    return "text_encoder_2" if wide else component


def _grouped(keys: list[str], bare: str | None, *, pooled_text: bool) -> tuple[dict[str, dict[str, str]], list[str]]:
    """component -> {name without prefix: key}, and the keys of none. SGM's SD 2 has its text encoder where the refiner
    has the pooled one."""
    grouped: dict[str, dict[str, str]] = {}
    unknown = []
    for key in keys:
        prefix = "" if bare else next((prefix for prefix in PREFIXES if key.startswith(prefix)), None)
        if prefix is None:
            unknown.append(key)
            continue
        component = bare or PREFIXES[prefix]
        if prefix == SGM_PREFIX and not pooled_text:
            component = "text_encoder"
        grouped.setdefault(component, {})[key.removeprefix(prefix)] = key
    return grouped, unknown


def _part(component: str, keys: Mapping[str, str], tensors: Tensors) -> tuple[Part, list[str]]:
    """The part, and the keys that the original layout does not know."""
    markers, read_table = LAYOUTS.get(component, ("", None))
    original = not keys.keys().isdisjoint(markers.split("|"))
    table = ldm.inverse(read_table(keys)) if original else {}
    named, unknown = {}, []
    for name, key in keys.items():
        names = ldm.translated(name, table) if original else [_full(component, name)]
        named |= {other: (name, key) for other in names}
        unknown += [] if names else [key]
    part = Part(tensors, named, original=original)
    return part.without(PENULTIMATE) if component == "text_encoder" else part, unknown


def _full(component: str, name: str) -> str:
    """Old files and new transformers leave out the prefix text_model."""
    shortened = component.startswith("text_encoder") and not name.startswith(("text_model.", "text_projection."))
    return f"text_model.{name}" if shortened else name


def _config(
    path: Path, component: str, part: Part, known: Mapping[str, Callable[[Part], dict[str, Any]]]
) -> dict[str, Any]:
    try:
        return known[component](part)
    except KeyError as error:
        raise CheckpointError(f"{path}: its {component} has no {error.args[0]}") from None


def _text_config(part: Part) -> dict[str, Any]:
    return configs.text_encoder(part, open_clip=part.original)


CONFIGS: Mapping[str, Callable[[Part], dict[str, Any]]] = {
    "unet": configs.unet,
    "controlnet": configs.controlnet,
    "adapter": configs.adapter,
    "upscaler": configs.upscaler,
    "vae": configs.vae,
    "text_encoder": _text_config,
    "text_encoder_2": _text_config,
}
