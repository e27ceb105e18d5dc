"""A pipeline of PyTorch, saved in each format of a folder."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import original_layout as layout
import torch
from flax import serialization
from safetensors.torch import load_file


def networks(pipe: diffusers.DiffusionPipeline) -> dict[str, torch.nn.Module]:
    return {name: value for name, value in pipe.components.items() if isinstance(value, torch.nn.Module)}


def save(pipe: diffusers.DiffusionPipeline, folder: Path, dtype: torch.dtype = torch.float32, **kw: Any) -> None:
    for module in networks(pipe).values():
        module.to(dtype)
    pipe.save_pretrained(folder, **kw)
    for module in networks(pipe).values():
        module.float()


def save_pickles(pipe: diffusers.DiffusionPipeline, folder: Path, **kw: Any) -> None:
    """As transformers 5 no longer does: the text encoders, too."""
    save(pipe, folder, safe_serialization=False, **kw)
    for path in folder.glob("text_encoder*/model*.safetensors"):
        torch.save(load_file(path), path.with_name(pickled(path.name)))
        path.unlink()
    for path in folder.glob("text_encoder*/*.index.json"):
        path.with_name(pickled(path.name)).write_text(pickled(path.read_text()))
        path.unlink()


def pickled(text: str) -> str:
    return re.sub(r"\bmodel([-\d\w]*)\.safetensors", r"pytorch_model\1.bin", text)


def save_mixed(pipe: diffusers.DiffusionPipeline, folder: Path) -> None:
    """A UNet in halves, other models without; a VAE that is pickled, a text encoder in shards."""
    save(pipe, folder, max_shard_size="40KB")
    for name, option in (("unet", {"variant": "fp16"}), ("vae", {"safe_serialization": False})):
        shutil.rmtree(folder / name)
        module = networks(pipe)[name]
        module.to(torch.float16 if "variant" in option else torch.float32).save_pretrained(folder / name, **option)
        module.float()


FLAX_UNET = (
    *("sample_size", "in_channels", "out_channels", "down_block_types", "up_block_types", "mid_block_type"),
    *("only_cross_attention", "block_out_channels", "layers_per_block", "attention_head_dim", "num_attention_heads"),
    *("cross_attention_dim", "dropout", "use_linear_projection", "flip_sin_to_cos", "freq_shift", "norm_num_groups"),
    *("transformer_layers_per_block", "addition_embed_type", "addition_time_embed_dim"),
    *("addition_embed_type_num_heads", "projection_class_embeddings_input_dim"),
)
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def save_flax(pipe: diffusers.DiffusionPipeline, folder: Path, dtype: Any = np.float32) -> None:
    """As diffusers up to 0.35 saved the pipelines of Flax."""
    save(pipe, folder)
    for name, module in networks(pipe).items():
        [weights], is_ours = folder.glob(f"{name}/*.safetensors"), isinstance(module, diffusers.ModelMixin)
        file = "diffusion_flax_model.msgpack" if is_ours else "flax_model.msgpack"
        weights.with_name(file).write_bytes(serialization.msgpack_serialize(flax_tree(module, is_ours, dtype)))
        weights.unlink()
        if is_ours:
            config = json.loads((folder / name / "config.json").read_text())
            more = {"use_memory_efficient_attention": True, "split_head_dim": True}
            config = {k: config[k] for k in FLAX_UNET if k in config} | more if name == "unet" else config
            write_json(folder / name / "config.json", {**config, "_class_name": f"Flax{type(module).__name__}"})
    index = json.loads((folder / "model_index.json").read_text())
    for name in ("scheduler", *networks(pipe)):
        index[name][1] = f"Flax{index[name][1]}"
    write_json(folder / "model_index.json", {**index, "_class_name": f"Flax{index['_class_name']}"})
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    write_json(path, {**config, "_class_name": f"Flax{config['_class_name']}"})


def flax_tree(module: torch.nn.Module, is_ours: bool, dtype: Any) -> dict[str, Any]:
    """Flax's names and layouts; numbers are part of a name in diffusers, names of their own in transformers."""
    tree: dict[str, Any] = {}
    for name, tensor in layout.state(module).items():
        owner, _, leaf = name.rpartition(".")
        known = name if name in module.state_dict() else name.removeprefix("text_model.")
        kind = module.get_submodule(known.rpartition(".")[0])
        array = tensor.float().numpy().astype(dtype)
        if leaf == "weight" and isinstance(kind, torch.nn.Conv2d | torch.nn.Linear):
            leaf, array = "kernel", array.transpose((2, 3, 1, 0) if array.ndim == 4 else (1, 0))
        elif leaf == "weight":
            leaf = "embedding" if isinstance(kind, torch.nn.Embedding) else "scale"
        if is_ours:
            if isinstance(module, diffusers.AutoencoderKL):
                for new, old in OLD_ATTENTION.items():
                    owner = owner.replace(new, old)
            owner = re.sub(r"\.(\d+)", r"_\1", owner)
        branch = tree
        for key in filter(None, owner.split(".")):
            branch = branch.setdefault(key, {})
        branch[leaf] = np.ascontiguousarray(array)
    return tree


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value))
