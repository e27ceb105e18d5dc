"""Pipelines of PyTorch as single files in the original layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import oracle
import original_layout as layout
import torch
import transformers
from references import Reference, refer

from sdjax.text.vocabulary import clip_vocabulary


class Single(NamedTuple):
    """A pipeline of PyTorch as one state dict in the original layout."""

    reference: Reference
    configs: dict[str, dict[str, Any]]
    tensors: dict[str, torch.Tensor]


CLIP = {"vocab_size": 49408, "max_position_embeddings": 77}
SMALL = {"layers_per_block": 1, "use_linear_projection": True, "addition_time_embed_dim": 16}
SINGLE_CONFIGS = {
    "sd1": layout.TINY["sd1"],
    "sd2": {
        "unet": {**layout.TINY["sd2"]["unet"], "layers_per_block": 1, "cross_attention_dim": 64},
        "text_encoder": layout.text_config(64, 2, "gelu", 64),
    },
    "sdxl": {
        "unet": layout.unet_config(
            (32, 64),
            (False, True),
            attention_head_dim=(1, 1),
            cross_attention_dim=64 + 64,
            transformer_layers_per_block=(1, 2),
            **SMALL,
            **layout.xl(96 + 6 * 16),
        ),
        "text_encoder": layout.text_config(64, 2, "quick_gelu", 64),
        "text_encoder_2": layout.text_config(64, 3, "gelu", 96),
    },
    "refiner": {
        "unet": layout.unet_config(
            (32, 64, 64),
            (False, True, False),
            attention_head_dim=(1, 1, 1),
            cross_attention_dim=64,
            transformer_layers_per_block=2,
            **SMALL,
            **layout.xl(64 + 5 * 16),
        ),
        "text_encoder_2": layout.text_config(64, 3, "gelu", 64),
    },
}
SINGLE_CONFIGS["lcm"] = {**layout.TINY["sd1"], "unet": {**layout.TINY["sd1"]["unet"], "time_cond_proj_dim": 16}}
SINGLE_CONFIGS["ssd-1b"] = {
    **SINGLE_CONFIGS["sdxl"],
    "unet": {
        **SINGLE_CONFIGS["sdxl"]["unet"],
        "layers_per_block": 2,
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, [2, 1]],
        "reverse_transformer_layers_per_block": [[1, 2, 3], 1],
    },
}
LAYOUTS = {"lcm": "sd1", "ssd-1b": "sdxl"}
"""The family whose layout these have"""
SINGLE = {
    "sd1": ("sd1", oracle.SD1, {}),
    "sd2": ("sd2", replace(oracle.SD2, prediction_type="epsilon"), {"prediction_type": "epsilon"}),
    "sd2-v": ("sd2", oracle.SD2, {"prediction_type": "v_prediction"}),
    "sdxl": ("sdxl", oracle.SDXL, {}),
    "refiner": ("refiner", oracle.REFINER, {}),
    "lcm": ("lcm", oracle.LCM, {}),
    "ssd-1b": ("ssd-1b", oracle.SDXL, {}),
}
"""name -> (configs, family, options of loading)"""


def single_configs(kind: str) -> dict[str, dict[str, Any]]:
    """Of the widths that a single file can have, and with CLIP's own vocabulary."""
    name, family, _ = SINGLE[kind]
    vae = {**layout.TINY["sd1"]["vae"], "scaling_factor": family.vae["scaling_factor"]}
    configs = {part: {**config, **(CLIP if "text" in part else {})} for part, config in SINGLE_CONFIGS[name].items()}
    return {**configs, "vae": vae}


def clip_tokenizer(pad_token: str) -> transformers.CLIPTokenizer:
    vocab, merges = clip_vocabulary()
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=77)


def original_pipeline(folder: Path, kind: str) -> Single:
    (name, family, _), configs = SINGLE[kind], single_configs(kind)
    models = {
        part: oracle.randomised(layout.model(part, config), i) for i, (part, config) in enumerate(configs.items())
    }
    tokenizers = {"text_encoder": ("tokenizer", family.pad_token), "text_encoder_2": ("tokenizer_2", "!")}
    tokenizers = {own: clip_tokenizer(pad) for part, (own, pad) in tokenizers.items() if part in models}
    reference = refer(oracle.pipeline(folder, family, **models, **tokenizers), name)
    states = {part: layout.state(model) for part, model in models.items()}
    return Single(reference, configs, layout.original(LAYOUTS.get(name, name), states, configs))
