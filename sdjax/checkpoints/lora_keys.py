"""How LoRA files spell their keys: the module that a key is of, the part that it is, the layer that a module means.

kohya:      lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight, .lora_up.weight, .lora_mid.weight, .alpha;
            the module also in the names of the original layout; lora_te_, lora_te1_, lora_te2_: text encoders
PEFT:       unet.down_blocks.0.attentions.0.proj_in.lora_A.weight, .lora_B.weight; text_encoder., text_encoder_2.
diffusers:  ….lora.down.weight, ….lora_linear_layer.down.weight, the oldest ….attn1.processor.to_q_lora.down.weight
LyCORIS:    kohya's and lycoris_ with the parts that `lora_kinds` names: .hada_w1_a, .lokr_w1, .diff, …
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from sdjax.checkpoints import ldm
from sdjax.checkpoints.lora_kinds import PARTS, Misfit, Shape

KEY = re.compile(
    r"(?P<module>.+?)(?:"
    r"(?:\.lora_|[._]lora(?:_linear_layer)?\.)(?P<factor>down|up|mid|A|B)(?:\.\w+)?\.(?P<leaf>weight|bias)"
    r"|\.(?P<magnitude>lora_magnitude_vector)(?:\.\w+)*"
    rf"|(?:[._]lora)?\.(?P<part>{'|'.join(PARTS)})(?:\.weight)?)"
)
PEFT_FACTORS = {"A": "down", "B": "up"}
PEFT_PREFIX = "base_model.model."
PREFIXES = {
    "lora_unet_": "unet",
    "oft_unet_": "unet",
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
    PEFT_PREFIX: None,
}
OTHER_SPELLINGS = (
    (r"\.to_out\.0$", ".to_out"),
    (r"\.self_attn\.(q|k|v|out)_proj$", r".self_attn.to_\1"),
    (r"^text_model\.", ""),  # transformers 5 leaves it out
)
ORIGINAL_LAYOUT = re.compile(r"(input_blocks|middle_block|output_blocks)[._]")
DIFFUSERS_LAYOUT = re.compile(r"(down_blocks|mid_block|up_blocks)[._]")

UNSUPPORTED = {
    r"\.(oft|boft)_(?!blocks)": "OFT layers in another spelling than that of LyCORIS",
    r"\.ia3_l": "IA3 layers of PEFT",
    r"\.lambda_layer$|\.[pq]_layer\.weight$": "T-LoRA layers, whose rank depends on the noise level",
    r"\.lora_embedding_|^bundle_emb\.|^<.*>$": "embeddings",
    r"^lora_te3_|^(lora_)?transformer[._]|(double|single|joint)_(transformer_)?blocks[._]": "layers of Flux or SD 3",
    r"^lora_controlnet|^lllite_": "layers of a ControlNet",
    r"^model\.diffusion_model\.|^cond_stage_model\.|^conditioner\.": "a whole checkpoint, which is no LoRA",
    r"^string_to_param$|^emb_params$|^clip_[lg]$": "a textual inversion, which is no LoRA",
}
"""What the keys of files that are handed around with LoRAs hold, where it is no change of weights that can be merged"""

Modules = dict[str, dict[str, str]]
"""{module as the file spells it: {part: key}}"""


def unsupported(keys: Iterable[str]) -> dict[str, list[str]]:
    """{what they hold: keys} for the keys of UNSUPPORTED."""
    found: dict[str, list[str]] = {}
    for key in keys:
        kind = next((kind for pattern, kind in UNSUPPORTED.items() if re.search(pattern, key)), None)
        if kind:
            found.setdefault(f"not supported: {kind}", []).append(key)
    return found


def modules(keys: Collection[str]) -> tuple[Modules, list[str]]:
    """The modules of a file, and the keys that are no part of one.

    Some files hold the UNet in both layouts: then that of diffusers counts.
    """
    found: Modules = {}
    strangers = []
    for key in keys:
        module, part = _split(key)
        if part not in PARTS or (part == "weight" and f"{module}.on_input" not in keys):
            strangers.append(key)
        else:
            found.setdefault(module, {})[part] = key
    original = {module for module in found if ORIGINAL_LAYOUT.search(module)}
    if any(DIFFUSERS_LAYOUT.search(module) for module in found.keys() - original):
        found = {module: parts for module, parts in found.items() if module not in original}
    return found, strangers


def _split(key: str) -> tuple[str, str | None]:
    """(module, part) of a key; None: it is none of a module's."""
    match = KEY.fullmatch(key)
    if not match:
        return key, None
    part = match["part"] or match["magnitude"] or PEFT_FACTORS.get(match["factor"], match["factor"])
    return match["module"], f"{part}_bias" if match["leaf"] == "bias" else part


def without_prefix(module: str) -> tuple[str | None, str]:
    """(component, None where the file does not name it; path in it). diffusers 0.22 wrote prefixes twice."""
    component = None
    while prefix := next((prefix for prefix in PREFIXES if module.startswith(prefix)), None):
        component = component or PREFIXES[prefix]
        module = module.removeprefix(prefix)
    return component, module


class Layers:
    """Finds the layer that a module of a file means, among the spellings of all layers."""

    def __init__(self, shapes: Mapping[str, Mapping[str, Shape]], unet_config: Mapping[str, Any]):
        self._paths: dict[str, dict[str, str]] = {}
        for component, names in shapes.items():
            spellings = self._paths[component] = {}
            for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
                others = [re.sub(pattern, new, path) for pattern, new in OTHER_SPELLINGS]
                if component == "unet":
                    others.append(ldm.unet_name(path, unet_config))
                for spelling in (path, *others):
                    spellings.setdefault(_joined(spelling), path)

    def find(self, module: str) -> tuple[str, str]:
        """(component, path). Raises Misfit where there is none."""
        component, path = without_prefix(module)
        if component and component not in self._paths:
            raise Misfit(f"for the {component}, which this model does not have")
        for candidate in [component] if component else self._paths:
            if found := self._paths[candidate].get(_joined(path)):
                return candidate, found
        raise Misfit(f"for no weight of the {component or ' or the '.join(self._paths)}")


def _joined(path: str) -> str:
    """A module path in kohya's spelling, without the attention processor that diffusers had in it at first."""
    return path.replace(".processor.", ".").replace(".", "_")
