"""Configs of diffusers and transformers, inferred from the names and shapes of a model's tensors.

What no shape determines is as every published model has it: 32 groups in a group norm, heads of 64 channels (8 heads
per level where the UNet's projections are convolutions, as in SD 1).
"""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from sdjax.checkpoints.ldm import counts

Tensors = Mapping[str, np.ndarray]
HEAD_WIDTH = 64
TIME_ID_WIDTH = 256
SHUFFLED = {3: 4, 12: 2, 48: 1}
"""The channels that an ESRGAN takes, and its scale"""
SD1_HEADS = 8
XL_PIXELS = 16
QUICK_GELU_WIDTH = 768  # OpenAI's CLIP, with quick_gelu, is at most this wide; OpenCLIP's larger ones have gelu


def unet(tensors: Tensors) -> dict[str, Any]:
    """The config of a UNet2DConditionModel with these tensors. Raises KeyError for one that is missing."""
    count, config = counts(tensors), _encoder(tensors)
    levels = len(config["block_out_channels"])
    config |= {
        "_class_name": "UNet2DConditionModel",
        "out_channels": tensors["conv_out.bias"].shape[0],
        "up_block_types": _kinds(tensors, levels, "up_blocks", "CrossAttnUpBlock2D", "UpBlock2D"),
        **_depths(count, _layers(count)),
    }
    if "time_embedding.cond_proj.weight" in tensors:
        config["time_cond_proj_dim"] = tensors["time_embedding.cond_proj.weight"].shape[1]
    return config


def controlnet(tensors: Tensors) -> dict[str, Any]:
    """The config of a ControlNetModel, or ControlNetUnionModel, with these tensors. Raises KeyError as above."""
    count = counts(tensors)
    depths = [
        _transformers(count, name, n) for name, n in zip(_down(count["down_blocks."]), _layers(count), strict=True)
    ]
    depths[-1] = depths[-1] or [count["mid_block.attentions.0.transformer_blocks."]]
    config = _encoder(tensors) | {
        **control_lora(tensors),
        "conditioning_channels": tensors["controlnet_cond_embedding.conv_in.weight"].shape[1],
        "transformer_layers_per_block": [max(own, default=0) or 1 for own in depths],
    }
    if "addition_embed_type" in config:
        config["addition_time_embed_dim"] = TIME_ID_WIDTH
    return config | (_union(tensors) if "task_embedding" in tensors else {})


def control_lora(tensors: Tensors) -> dict[str, Any]:
    """What a Control-LoRA says of the config of its ControlNetModel; the rest is the UNet's."""
    blocks = counts(tensors)["controlnet_cond_embedding.blocks."]
    names = ["conv_in", *(f"blocks.{i}" for i in range(1, blocks, 2))]
    hints = [tensors[f"controlnet_cond_embedding.{name}.bias"].shape[0] for name in names]
    return {"_class_name": "ControlNetModel", "conditioning_embedding_out_channels": hints}


def _union(tensors: Tensors) -> dict[str, Any]:
    """What the config of a ControlNetUnionModel has beside."""
    types, channels = tensors["task_embedding"].shape
    return {
        "_class_name": "ControlNetUnionModel",
        "num_control_type": types,
        "num_trans_channel": channels,
        "num_trans_layer": counts(tensors)["transformer_layes."],
        "num_proj_channel": tensors["spatial_ch_projs.weight"].shape[0],
        "addition_time_embed_dim": tensors["control_add_embedding.linear_1.weight"].shape[1] // types,
    }


def adapter(tensors: Tensors) -> dict[str, Any]:
    """The config of a T2IAdapter with these tensors. Raises KeyError as above.

    One that takes 16 pixels on a side at once is SDXL's.
    """
    count, is_light = counts(tensors), "adapter.conv_in.weight" not in tensors
    blocks = [f"adapter.body.{i}" for i in range(count["adapter.body."])]
    last = "out_conv" if is_light else "resnets.0.block1"
    widths = [tensors[f"{block}.{last}.weight"].shape[0] for block in blocks]
    pixels = tensors["adapter.body.0.in_conv.weight" if is_light else "adapter.conv_in.weight"].shape[1]
    colours = 1 if math.isqrt(pixels) ** 2 == pixels else 3
    factor = math.isqrt(pixels // colours)
    return {
        "_class_name": "T2IAdapter",
        "in_channels": colours,
        "channels": widths[:-1] if is_light else widths,  # the last level of a light one has those of the one before
        "num_res_blocks": count["adapter.body.0.resnets."],
        "downscale_factor": factor,
        "adapter_type": "light_adapter" if is_light else "full_adapter" if factor < XL_PIXELS else "full_adapter_xl",
    }


def _encoder(tensors: Tensors) -> dict[str, Any]:
    """What the configs of a UNet and of a ControlNet have in common."""
    count = counts(tensors)
    levels = count["down_blocks."]
    widths = [tensors[f"down_blocks.{i}.resnets.0.conv1.bias"].shape[0] for i in range(levels)]
    attending = (name for name in ("mid_block", *_down(levels)) if count[f"{name}.attentions."])
    transformer = f"{next(attending, 'mid_block')}.attentions.0"
    linear = tensors[f"{transformer}.proj_in.weight"].ndim == 2
    config = {
        "in_channels": tensors["conv_in.weight"].shape[1],
        "block_out_channels": widths,
        "down_block_types": _kinds(tensors, levels, "down_blocks", "CrossAttnDownBlock2D", "DownBlock2D"),
        "mid_block_type": _middle(count),
        "layers_per_block": _one(_layers(count)),
        "cross_attention_dim": tensors[f"{transformer}.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "attention_head_dim": [heads(width) for width in widths] if linear else SD1_HEADS,
        "use_linear_projection": linear,
    }
    if "add_embedding.linear_1.weight" in tensors:
        config |= {
            "addition_embed_type": "text_time",
            "projection_class_embeddings_input_dim": tensors["add_embedding.linear_1.weight"].shape[1],
        }
    return config


def _layers(count: Mapping[str, int]) -> list[int]:
    """Of each level on the way down."""
    return [count[f"{name}.resnets."] for name in _down(count["down_blocks."])]


def upscaler(tensors: Tensors) -> dict[str, Any]:
    """The config of an RRDBNet with these tensors, which have the names of one of its three spellings."""
    shapes = {name: array.shape for name, array in tensors.items()}
    first = shapes.get("conv_first.weight") or shapes["model.0.weight"]
    grown = next((shape for name, shape in shapes.items() if re.search(r"[rR][dD][bB]1\.conv1\b.*weight$", name)), None)
    if grown is None or first[1] not in SHUFFLED:
        raise KeyError("layers of an ESRGAN that is known")
    found = counts(shapes)
    blocks = found["body."] or found["RRDB_trunk."] or found["model.1.sub."] - 1
    return {
        "_class_name": "RRDBNet",
        "num_feat": first[0],
        "num_grow_ch": grown[0],
        "num_block": blocks,
        "scale": SHUFFLED[first[1]],
    }


def vae(tensors: Tensors) -> dict[str, Any]:
    """The config of an AutoencoderKL with these tensors, but for its scaling_factor, or of an AutoencoderTiny.

    Raises KeyError as above.
    """
    if "decoder.layers.0.weight" in tensors:
        return _tiny_vae(tensors)
    count = counts(tensors)
    blocks = [f"encoder.down_blocks.{i}" for i in range(count["encoder.down_blocks."])]
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["decoder.conv_out.bias"].shape[0],
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "block_out_channels": [tensors[f"{block}.resnets.0.conv1.bias"].shape[0] for block in blocks],
        "down_block_types": ["DownEncoderBlock2D"] * len(blocks),
        "up_block_types": ["UpDecoderBlock2D"] * len(blocks),
        "layers_per_block": count["encoder.down_blocks.0.resnets."],
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
    }


def _tiny_vae(tensors: Tensors) -> dict[str, Any]:
    """Without an encoder where the tensors are those of a decoder alone."""
    width, latents = tensors["decoder.layers.0.weight"].shape[:2]
    encoder, decoder = _runs(tensors, "encoder.layers."), _runs(tensors, "decoder.layers.")
    pixels = tensors[f"decoder.layers.{counts(tensors)['decoder.layers.'] - 1}.weight"].shape[0]
    return {
        "_class_name": "AutoencoderTiny",
        "in_channels": pixels,
        "out_channels": pixels,
        "latent_channels": latents,
        "encoder_block_out_channels": [width] * len(encoder),
        "decoder_block_out_channels": [width] * len(decoder),
        "num_encoder_blocks": encoder,
        "num_decoder_blocks": decoder,
    }


def _runs(names: Collection[str], prefix: str) -> list[int]:
    """How many residual blocks there are between each of the convolutions and the next."""
    runs: list[int] = []
    for n in range(counts(names)[prefix]):
        if f"{prefix}{n}.weight" in names:
            runs.append(0)
        elif f"{prefix}{n}.conv.0.weight" in names:
            runs[-1] += 1
    return runs[:-1]


def text_encoder(tensors: Tensors, *, open_clip: bool) -> dict[str, Any]:
    """The config of a CLIPTextModel with these tensors, and their projection if there is one. Raises KeyError as above.

    open_clip: the activation is the exact gelu of OpenCLIP, whatever the width.
    """
    vocab_size, width = tensors["text_model.embeddings.token_embedding.weight"].shape
    projected = "text_projection.weight" in tensors
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": tensors["text_model.encoder.layers.0.mlp.fc1.bias"].shape[0],
        "num_hidden_layers": counts(tensors)["text_model.encoder.layers."],
        "num_attention_heads": heads(width),
        "max_position_embeddings": tensors["text_model.embeddings.position_embedding.weight"].shape[0],
        "projection_dim": tensors["text_projection.weight"].shape[0] if projected else width,
        "hidden_act": "gelu" if open_clip or width > QUICK_GELU_WIDTH else "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 2,  # as published; it stands for the largest id of a text
        "pad_token_id": 1,
    }


def heads(width: int) -> int:
    """How many heads of 64 channels: one at least."""
    return max(1, width // HEAD_WIDTH)


def _kinds(names: Collection[str], levels: int, blocks: str, attending: str, plain: str) -> list[str]:
    return [attending if f"{blocks}.{i}.attentions.0.norm.weight" in names else plain for i in range(levels)]


def _middle(count: Mapping[str, int]) -> str | None:
    """Models that were made smaller have one residual block in the middle, or nothing."""
    if count["mid_block.attentions."]:
        return "UNetMidBlock2DCrossAttn"
    return "UNetMidBlock2D" if count["mid_block.resnets."] else None


def _depths(count: Mapping[str, int], layers: list[int]) -> dict[str, Any]:
    """Blocks in the transformers of each level: one number where they are alike on both ways, else one for each.

    Where a level has none, as in the middle (the coarsest), else 1.
    """
    levels, middle = len(layers), count["mid_block.attentions.0.transformer_blocks."]
    down = [_transformers(count, name, n) for name, n in zip(_down(levels), layers, strict=True)]
    up = [_transformers(count, f"up_blocks.{i}", n + 1) for i, n in enumerate(reversed(layers))]
    down[-1] = down[-1] or [middle] * (middle > 0)
    found = [{*there, *back} for there, back in zip(down, reversed(up), strict=True)]
    if all(len(depths) <= 1 for depths in found):
        known = [*set().union(*found)]
        one = known[0] if len(known) == 1 else [max(depths, default=1) for depths in found]
        return {"transformer_layers_per_block": one}
    return {
        "transformer_layers_per_block": [depths or 1 for depths in down],
        "reverse_transformer_layers_per_block": [depths or 1 for depths in up],
    }


def _transformers(count: Mapping[str, int], block: str, layers: int) -> list[int]:
    """The depths of a level's transformers; empty where it has none."""
    depths = [count[f"{block}.attentions.{i}.transformer_blocks."] for i in range(layers)]
    return depths if any(depths) else []


def _down(levels: int) -> list[str]:
    return [f"down_blocks.{i}" for i in range(levels)]


def _one(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values
