"""Configs of models: of the published ones, and of a folder, without its weights."""

from collections.abc import Mapping, Sequence
from typing import Any

from sdjax import components
from sdjax.checkpoints import folder, hub

Configs = Mapping[str, Mapping[str, Any]]
"""component -> its config.json"""

CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
OPEN_CLIP_H = CLIP_L | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
OPEN_CLIP_BIG_G = CLIP_L | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
PUBLISHED: Mapping[str, Configs] = {
    "sd15": {
        "text_encoder": CLIP_L,
        "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": VAE,
    },
    "sd21": {
        "text_encoder": OPEN_CLIP_H,
        "unet": {
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
        "vae": VAE,
    },
    "sdxl": {
        "text_encoder": CLIP_L,
        "text_encoder_2": OPEN_CLIP_BIG_G,
        "unet": {
            "sample_size": 128,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": VAE,
    },
}
"""Stable Diffusion 1.5, 2.1 (768) and XL base; keys with their default values are left out."""


def read(model: str, controlnets: Sequence[str] = (), adapters: Sequence[str] = ()) -> Configs:
    """The configs of a published model, or of the components in a diffusers folder or a Hub repository, and of
    ControlNets and T2I-Adapters in folders or repositories.

    No weights are read. Raises ValueError for one file of weights, FileNotFoundError and CheckpointError as
    `sdjax.components.read_folder`.
    """
    places = dict(zip(components.CONTROLNETS, controlnets, strict=False))
    places |= zip(components.ADAPTERS, adapters, strict=False)
    return {**_read(model), **{name: _of_network(place) for name, place in places.items()}}


def _of_network(place: str) -> Mapping[str, Any]:
    if components.is_file(place):
        raise ValueError(f"{place}: one file, which has no config: give a folder or a Hub id")
    return folder.read_json(hub.resolve_file(place, ("config.json",)))


def _read(model: str) -> Configs:
    if model in PUBLISHED:
        return PUBLISHED[model]
    if components.is_file(model):
        raise ValueError(f"{model}: one file, which has no configs; `sdjax convert` makes a folder of it")
    index = folder.read_json(hub.resolve_file(model, (hub.INDEX,)))
    listed = [name for name in components.MODELS if (index.get(name) or [None])[0]]
    if controls := [name for name in listed if name.startswith(("controlnet", "adapter"))]:
        raise ValueError(f"{model}: has a {controls[0]}; plan for a model without, with --{controls[0].split('_')[0]}")
    found = {name: _config(model, name) for name in listed}
    return {name: config for name, config in found.items() if config is not None}


def _config(model: str, name: str) -> Mapping[str, Any] | None:
    """None: a safety checker that is listed and not there."""
    try:
        return folder.read_json(hub.resolve_file(model, (f"{name}/config.json",)))
    except FileNotFoundError:
        if name == "safety_checker":
            return None
        raise
