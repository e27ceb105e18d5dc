"""Tiny models of each family, and their state dicts in the original layout (LDM, SGM), as single files have it."""

from pathlib import Path
from typing import Any

import oracle
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdjax.checkpoints import ldm

DOWN, UP = {False: "DownBlock2D", True: "CrossAttnDownBlock2D"}, {False: "UpBlock2D", True: "CrossAttnUpBlock2D"}
State = dict[str, torch.Tensor]


def unet_config(widths, attends, **more) -> dict[str, Any]:
    return {
        "block_out_channels": widths,
        "down_block_types": [DOWN[a] for a in attends],
        "up_block_types": [UP[a] for a in reversed(attends)],
        **more,
    }


def xl(channels: int) -> dict[str, Any]:
    return {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": channels}


def vae_config(*widths: int, layers: int = 2) -> dict[str, Any]:
    return {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": layers,
    }


def text_config(width: int, layers: int, act: str, projection_dim: int, **more) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "hidden_act": act}
    return {**sizes, "num_attention_heads": width // 64, "projection_dim": projection_dim, **more}


SMALL = {"vocab_size": 100, "max_position_embeddings": 20}
TINY = {
    "sd1": {
        "unet": unet_config((32, 64), (True, False), attention_head_dim=8, cross_attention_dim=64, layers_per_block=1),
        "text_encoder": text_config(64, 2, "quick_gelu", 64, **SMALL),
    },
    "sd2": {
        "unet": unet_config(
            (64, 128),
            (True, False),
            attention_head_dim=(1, 2),
            cross_attention_dim=128,
            use_linear_projection=True,
            layers_per_block=2,
        ),
        "text_encoder": text_config(128, 2, "gelu", 128, **SMALL),
    },
    "sdxl": {
        "unet": unet_config(
            (32, 64, 128),
            (False, True, True),
            attention_head_dim=(1, 1, 2),
            cross_attention_dim=64 + 128,
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2, 3),
            layers_per_block=2,
            addition_time_embed_dim=16,
            **xl(96 + 6 * 16),
        ),
        "text_encoder": text_config(64, 2, "quick_gelu", 64, **SMALL),
        "text_encoder_2": text_config(128, 3, "gelu", 96, **SMALL),
    },
    "refiner": {
        "unet": unet_config(
            (32, 64, 128, 128),
            (False, True, True, False),
            attention_head_dim=(1, 1, 2, 2),
            cross_attention_dim=128,
            use_linear_projection=True,
            transformer_layers_per_block=2,
            layers_per_block=2,
            addition_time_embed_dim=16,
            **xl(128 + 5 * 16),
        ),
        "text_encoder_2": text_config(128, 2, "gelu", 128, **SMALL),
    },
}
for family in TINY.values():
    family["vae"] = vae_config(32, 64, layers=1)

PREFIXES = {
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "refiner": {"text_encoder_2": "conditioner.embedders.0.model."},
}
UNET, VAE = "model.diffusion_model.", "first_stage_model."


def model(component: str, config: dict[str, Any]) -> torch.nn.Module:
    if component == "unet":
        return UNet2DConditionModel(**config)
    if component == "vae":
        return AutoencoderKL(**config)
    cls = CLIPTextModelWithProjection if component == "text_encoder_2" else CLIPTextModel
    return cls(CLIPTextConfig(**config))


def state(module: torch.nn.Module) -> State:
    """With the prefix that every published text encoder has."""
    tensors = module.state_dict()
    if not isinstance(module, CLIPTextModel):
        return tensors
    return {name if name.startswith("text_model.") else f"text_model.{name}": x for name, x in tensors.items()}


def open_clip(tensors: State, layers: int) -> State:
    """The text encoder as OpenCLIP has it."""
    config, out = {"num_hidden_layers": layers}, {}
    for name, x in tensors.items():
        if "self_attn.q_proj" in name:
            x = torch.cat([tensors[name.replace("q_proj", f"{p}_proj")] for p in "qkv"])
        elif "self_attn.k_proj" in name or "self_attn.v_proj" in name:
            continue
        out[ldm.open_clip_name(name, config)] = x.T.contiguous() if name == "text_projection.weight" else x
    return out


def original_vae(tensors: State, config: dict[str, Any]) -> State:
    """The VAE in the original layout: its attention is made of convolutions."""
    names = {ldm.vae_name(name, config): x for name, x in tensors.items()}
    return {name: x[..., None, None] if ".attn_1." in name and x.ndim == 2 else x for name, x in names.items()}


def prefixed(prefix: str, tensors: State) -> State:
    return {prefix + name: x for name, x in tensors.items()}


def original(family: str, models: dict[str, State], configs: dict[str, Any]) -> State:
    """The models of a family as one state dict in the original layout."""
    unet = {ldm.unet_name(name, configs["unet"]): x for name, x in models["unet"].items()}
    tensors = {**prefixed(UNET, unet), **prefixed(VAE, original_vae(models["vae"], configs["vae"]))}
    for component, prefix in PREFIXES[family].items():
        hugging_face = prefix.endswith("transformer.")
        text = models[component]
        layers = configs[component]["num_hidden_layers"]
        tensors |= prefixed(prefix, text if hugging_face else open_clip(text, layers))
    return tensors


def tiny(family: str, **unet: Any) -> tuple[dict[str, State], State]:
    """Seeded models of a family: the state dict of each, and the original one of all."""
    configs = {**TINY[family], "unet": {**TINY[family]["unet"], **unet}}
    models = {
        name: state(oracle.randomised(model(name, config), i)) for i, (name, config) in enumerate(configs.items())
    }
    return models, original(family, models, configs)


def written(folder: Path, tensors: State, name: str = "model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    if name.endswith(".safetensors"):
        save_file({name: x.contiguous().clone() for name, x in tensors.items()}, folder / name)
    else:
        torch.save({"state_dict": tensors, "global_step": 7, "pytorch-lightning_version": "1.4"}, folder / name)
    return folder / name
