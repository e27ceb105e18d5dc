"""The oracle: tiny seeded PyTorch modules, and what it takes to compare a Flax module with them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PNDMScheduler,
    SchedulerMixin,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from flax import nnx
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdjax.checkpoints.folder import fill

MERGES = [("g", "o"), ("go", "o"), ("s", "e</w>"), ("goo", "se</w>"), ("b", "l"), ("u", "e</w>"), ("bl", "ue</w>")]
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def vocabulary() -> dict[str, int]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, MERGES), BOS, EOS]
    return {token: i for i, token in enumerate(tokens)}


@dataclass(frozen=True)
class Family:
    """The configs of a tiny pipeline's models, its scheduler, its padding token."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any] | None
    scheduler: type[SchedulerMixin]
    prediction_type: str = "epsilon"
    pad_token: str = EOS
    text_2: dict[str, Any] | None = None
    pipeline: type[DiffusionPipeline] = StableDiffusionPipeline
    options: dict[str, Any] = field(default_factory=dict)


UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 24,
}
VAE = {"layers_per_block": 1, "norm_num_groups": 4, "scaling_factor": 0.18215}
TEXT = {
    "vocab_size": len(vocabulary()),
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "bos_token_id": vocabulary()[BOS],
    "eos_token_id": vocabulary()[EOS],
    "pad_token_id": vocabulary()[EOS],
}
SD1 = Family(
    unet={**UNET, "attention_head_dim": 4},
    vae={**VAE, "block_out_channels": (8, 16, 16), "sample_size": 32},
    text={**TEXT, "hidden_act": "quick_gelu"},
    scheduler=PNDMScheduler,
)
ATTENDS = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
ATTENDING = replace(SD1, unet=SD1.unet | ATTENDS)
"""One level, each of whose blocks attends to the text"""
ONE_LEVEL = replace(
    SD1,
    unet=SD1.unet
    | {"block_out_channels": (16,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)},
)
SD2 = Family(
    unet={**UNET, "attention_head_dim": (2, 8), "use_linear_projection": True},
    vae={**VAE, "block_out_channels": (8, 16), "sample_size": 16},
    text={**TEXT, "hidden_act": "gelu"},
    scheduler=DDIMScheduler,
    prediction_type="v_prediction",
    pad_token="!",
)
XL_UNET = {
    **UNET,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
}
XL_TEXT_2 = {**TEXT, "hidden_size": 32, "hidden_act": "gelu", "projection_dim": 16, "num_hidden_layers": 3}
XL_VAE = {**SD2.vae, "scaling_factor": 0.13025}
SDXL = Family(
    unet={**XL_UNET, "cross_attention_dim": 24 + 32, "projection_class_embeddings_input_dim": 6 * 8 + 16},
    vae=XL_VAE,
    text={**TEXT, "hidden_act": "quick_gelu"},
    text_2=XL_TEXT_2,
    scheduler=EulerDiscreteScheduler,
    pipeline=StableDiffusionXLPipeline,
)
XL_ONE_LEVEL = replace(
    SDXL, unet=SDXL.unet | ATTENDS | {"attention_head_dim": (2,), "transformer_layers_per_block": (2,)}
)
REFINER = Family(
    unet={**XL_UNET, "cross_attention_dim": 32, "projection_class_embeddings_input_dim": 5 * 8 + 16},
    vae=XL_VAE,
    text=None,
    text_2=XL_TEXT_2,
    scheduler=EulerDiscreteScheduler,
    pipeline=StableDiffusionXLImg2ImgPipeline,
    options={"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False},
)
LCM = Family(
    unet={**SD1.unet, "time_cond_proj_dim": 16},
    vae=SD1.vae,
    text=SD1.text,
    scheduler=LCMScheduler,
    pipeline=LatentConsistencyModelPipeline,
)


def unet(config: dict[str, Any], seed: int = 0) -> UNet2DConditionModel:
    return randomised(UNet2DConditionModel(**config), seed)


def vae(config: dict[str, Any], seed: int = 0) -> AutoencoderKL:
    """An AutoencoderKL of as many levels as config["block_out_channels"] has."""
    levels = len(config["block_out_channels"])
    types = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    return randomised(AutoencoderKL(**types, **config), seed)


def text_encoder(config: dict[str, Any], seed: int = 0) -> CLIPTextModel:
    return randomised(CLIPTextModel(CLIPTextConfig(**config)), seed)


def tokenizer(folder: Path, pad_token: str) -> CLIPTokenizer:
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, MERGES)) + "\n", encoding="utf-8")
    config = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad_token, "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "CLIPTokenizer"}))
    return CLIPTokenizer.from_pretrained(folder)


def text_encoder_2(config: dict[str, Any], seed: int = 0) -> CLIPTextModelWithProjection:
    return randomised(CLIPTextModelWithProjection(CLIPTextConfig(**config)), seed)


SCHEDULER_OPTIONS = {
    PNDMScheduler: {"skip_prk_steps": True, "set_alpha_to_one": False},
    DDIMScheduler: {"clip_sample": False, "set_alpha_to_one": False},
    EulerDiscreteScheduler: {"timestep_spacing": "leading"},
    LCMScheduler: {},
}


def opened(folder: Path, kind: type[DiffusionPipeline]) -> DiffusionPipeline:
    """What PyTorch makes of a folder, which is of this class by its model_index.json."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is kind
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline(folder: Path, family: Family, **components: Any) -> DiffusionPipeline:
    """The family's pipeline of seeded random models; the tokenizers' files are written below folder."""
    scheduler = family.scheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=family.prediction_type,
        steps_offset=1,
        **SCHEDULER_OPTIONS[family.scheduler],
    )
    is_xl = family.text_2 is not None
    parts = {
        "unet": unet(family.unet, 1),
        "vae": vae(family.vae, 2),
        "text_encoder": None if family.text is None else text_encoder(family.text, 3),
        "tokenizer": None if family.text is None else tokenizer(folder / "tokenizer_files", family.pad_token),
        "scheduler": scheduler,
    }
    if is_xl:
        parts["text_encoder_2"] = text_encoder_2(family.text_2, 4)
        parts["tokenizer_2"] = tokenizer(folder / "tokenizer_2_files", "!")
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = family.pipeline(**{**parts, **family.options, **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_pipeline(folder: Path, family: Family, **components: Any) -> Path:
    """The diffusers folder that PyTorch saves of `pipeline`."""
    pipeline(folder, family, **components).save_pretrained(folder / "model")
    return folder / "model"


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Seeded values for every parameter that keep activations near 1, norms' scales and all biases included."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = 0.2 * noise + name.endswith("weight")
    return module.eval().requires_grad_(False)


class OneKey:
    """Stands for nnx.Rngs under a trace, where that takes time quadratic in its keys."""

    def params(self) -> jax.Array:
        return jax.random.key(0)


def ported(build: Callable[..., nnx.Module], reference: torch.nn.Module) -> nnx.Module:
    """The module that build(rngs=…) makes, with the reference's parameters."""
    module = nnx.eval_shape(lambda: build(rngs=OneKey()))
    fill(module, ((name, value.numpy()) for name, value in reference.state_dict().items()), source="reference")
    return module


@nnx.jit
def run(module: nnx.Module, *args: Any, **kw: Any) -> Any:
    return module(*args, **kw)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def nchw(x: np.ndarray) -> torch.Tensor:
    """NHWC array to contiguous NCHW tensor, the layout in which PyTorch's CPU norms are exact."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def nhwc(x: torch.Tensor) -> np.ndarray:
    return np.moveaxis(x.numpy(), 1, -1)


def assert_close(actual: Any, reference: Any, tolerance: float = 1e-5) -> None:
    """max |actual - reference| <= tolerance * max |reference|, for equal shapes and a reference that is not zero."""
    actual, reference = np.asarray(actual, np.float64), np.asarray(reference, np.float64)
    assert actual.shape == reference.shape
    scale = np.abs(reference).max()
    assert scale > 1e-3
    np.testing.assert_allclose(actual, reference, rtol=0, atol=tolerance * scale)
