"""Random weights of full-size models, and of tiny ones for rehearsals, in folders that PyTorch diffusers loads too."""

import json
import math
import tempfile
from hashlib import sha256
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sdjax import CLIPTokenizer, components
from sdjax.models.base import Model
from sdjax.plan.configs import PUBLISHED, Configs
from sdjax.text.vocabulary import clip_vocabulary

TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}
SIZES: dict[str, Configs] = {
    "sd15": PUBLISHED["sd15"],
    "sdxl": {"unet": PUBLISHED["sdxl"]["unet"]},
    "tiny": {
        "text_encoder": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
        },
        "unet": TINY_UNET,
        "vae": {
            "block_out_channels": [8, 16],
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
            "norm_num_groups": 4,
        },
    },
    "tiny-xl": {
        "unet": TINY_UNET
        | {
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64,
        }
    },
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
INDEX = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}


def folder(name: str, root: str | None = None) -> str:
    """The folder of float16 weights of this size, below `root` or the temporary folder, written if it is not there.

    With CLIP's tokenizer and the noise schedule of Stable Diffusion 1. It appears whole or not at all.
    """
    size, root = SIZES[name], Path(root or tempfile.gettempdir(), "sdjax-bench")
    path = root / f"{name}-{sha256(json.dumps(size, allow_nan=False).encode()).hexdigest()[:8]}"
    if not path.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        models = {
            name: _filled(components.MODELS[name][0], config, np.random.default_rng(seed))
            for seed, (name, config) in enumerate(size.items())
        }
        tokenizers = {"tokenizer": CLIPTokenizer(*clip_vocabulary())}
        with tempfile.TemporaryDirectory(dir=root) as unfinished:
            components.write_folder(Path(unfinished, "model"), models, tokenizers, {"scheduler": SCHEDULER}, INDEX)
            Path(unfinished, "model").rename(path)
    return str(path)


def _filled(cls: type[Model], config: dict, random: np.random.Generator) -> Model:
    """With values that keep activations near 1, norms' scales and biases included, in NumPy arrays."""
    model = cls.described(cls.config_class.from_dict(config), jnp.float16)
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        noise = random.standard_normal(leaf.shape, dtype=np.float32)
        if noise.ndim == 1:
            noise = 0.2 * noise + (path[-1] == "scale")
        else:
            noise /= math.sqrt(noise.shape[-1] if path[-1] == "embedding" else noise[..., 0].size)
        leaf.set_value(noise.astype(np.float16))
    return model
