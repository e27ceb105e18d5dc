"""Stable Diffusion 1.5 with random weights: the configs, and models and folders written from them."""

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from sdjax import models
from sdjax.models.base import Model, OneKey

UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
CLASSES = {
    "text_encoder": models.CLIPTextModel,
    "unet": models.UNet2DConditionModel,
    "vae": models.AutoencoderKL,
}


@dataclass(frozen=True)
class Size:
    """The configs of a pipeline's models, by component."""

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Tells sizes apart in file names."""
        return sha256(json.dumps(self.__dict__, allow_nan=False).encode()).hexdigest()[:8]


SD15 = Size(UNET, VAE, TEXT)
NARROW = Size(
    {
        "sample_size": 32,
        "block_out_channels": (128, 256),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 256,
        "attention_head_dim": 4,
    },
    VAE | {"block_out_channels": (64, 128, 128, 128), "layers_per_block": 1, "sample_size": 256},
    {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": 4},
)

Values = Callable[[str, tuple[int, ...]], np.ndarray]
"""(name of a parameter in its layer: kernel, scale, ..., shape) -> its values"""


def normal(*shape: int) -> np.ndarray:
    """The same standard normal float32 values every time."""
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def near_one(seed: int) -> Values:
    """Random values that keep activations near 1, norms' scales and biases included."""
    generator = np.random.default_rng(seed)

    def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = generator.standard_normal(shape, dtype=np.float32)
        if name == "embedding":
            return noise / shape[-1] ** 0.5
        return noise / math.prod(shape[:-1]) ** 0.5 if len(shape) > 1 else 0.2 * noise + (name == "scale")

    return values


def filled(cls: type[Model], config: Mapping[str, Any], values: Values, dtype: DTypeLike) -> Model:
    """A model with these values, in NumPy arrays of this dtype."""
    model = nnx.eval_shape(lambda: cls.from_config(config, param_dtype=dtype, rngs=OneKey()))
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        leaf.set_value(values(path[-1], leaf.shape).astype(dtype, copy=False))
    return model


def write_pipeline(size: Size, path: Path) -> None:
    """A diffusers folder of float16 weights, with CLIP's tokenizer and the noise schedule of Stable Diffusion 1.

    It appears whole or not at all.
    """
    from sdjax import CLIPTokenizer, StableDiffusionPipeline
    from sdjax.text.vocabulary import clip_vocabulary

    parts = {
        name: filled(cls, getattr(size, name), near_one(seed), jnp.float16)
        for seed, (name, cls) in enumerate(CLASSES.items())
    }
    pipe = StableDiffusionPipeline(**parts, tokenizer=CLIPTokenizer(*clip_vocabulary()), scheduler=SCHEDULER)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".sdjax-", suffix=".tmp") as unfinished:
        pipe.save_pretrained(Path(unfinished) / path.name)
        (Path(unfinished) / path.name).rename(path)
