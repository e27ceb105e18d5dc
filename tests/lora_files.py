"""LoRAs of PyTorch's modules, in each spelling of their files."""

from functools import partial

import torch
from safetensors.torch import save_file

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
EVERYTHING = ("",)
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te"}
KOHYA_SDXL = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


def factors(models, rank, seed=0, only=ATTENTION):
    """{component: {module: (down, up)}} for the linear layers and convolutions whose names end in one of `only`."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for component, model in models.items():
        for name, module in model.named_modules():
            if name.endswith(only) and isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                out, cin, *kernel = module.weight.shape
                down = torch.randn(rank, cin, *kernel, generator=generator) / module.weight[0].numel() ** 0.5
                up = torch.randn(out, rank, *(1 for _ in kernel), generator=generator)
                # published files have the prefix that transformers 5 leaves out
                encoder = name.startswith("encoder.")
                found.setdefault(component, {})[f"text_model.{name}" if encoder else name] = down, up
    return found


def kohya(components, prefixes=KOHYA, alpha=1.5, rename=lambda module: module):
    tensors = {}
    for component, modules in components.items():
        for module, (down, up) in modules.items():
            name = rename(module) if component == "unet" else module
            key = f"{prefixes[component]}_{name.replace('.', '_')}"
            tensors |= {
                f"{key}.lora_down.weight": down,
                f"{key}.lora_up.weight": up,
                f"{key}.alpha": torch.tensor(alpha),
            }
    return tensors


def dotted(components, down_end, up_end, rename=lambda module: module):
    tensors = {}
    for component, modules in components.items():
        for module, (down, up) in modules.items():
            key = f"{component}.{rename(module)}"
            tensors |= {key + down_end: down, key + up_end: up}
    return tensors


def oldest(module):
    """'….attn1.to_out.0' -> '….attn1.processor.to_out', '….self_attn.q_proj' -> '….self_attn.to_q'"""
    path, name = module.removesuffix(".0").rsplit(".", 1)
    return f"{path}.to_{name[:-5]}" if name.endswith("_proj") else f"{path}.processor.{name}"


SPELLINGS = {
    "kohya": (kohya, EVERYTHING),
    "PEFT": (partial(dotted, down_end=".lora_A.weight", up_end=".lora_B.weight"), EVERYTHING),
    "diffusers": (partial(dotted, down_end=".lora.down.weight", up_end=".lora.up.weight"), ATTENTION[:4]),
    "diffusers, linear layers": (
        partial(dotted, down_end=".lora_linear_layer.down.weight", up_end=".lora_linear_layer.up.weight"),
        ATTENTION[4:],
    ),
    "diffusers, the oldest": (
        partial(dotted, down_end="_lora.down.weight", up_end="_lora.up.weight", rename=oldest),
        ATTENTION,
    ),
}


def save(path, tensors):
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def load_theirs(pipe, path, name="a"):
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
