"""The image encoder of CLIP (arXiv:2103.00020): a picture to one state for each patch and one for the whole."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self, Unpack

import jax.numpy as jnp
from flax import nnx
from jax import Array

from sdjax.checkpoints.errors import CheckpointError
from sdjax.fields import Channels, Epsilon, Within
from sdjax.models.base import Model, ModelConfig
from sdjax.models.clip import ACTIVATIONS, Encoder, Layers
from sdjax.models.layers import LayerArgs, conv, embedding, layer_norm, linear

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the colours, in 0..1, that are brought to 0 and 1"""


@dataclass(frozen=True)
class CLIPVisionConfig(ModelConfig):
    """The fields of a transformers CLIPVisionConfig, with its defaults."""

    hidden_size: Channels = 768
    intermediate_size: Channels = 3072
    num_hidden_layers: Layers = 12
    num_attention_heads: Channels = 12
    num_channels: int = 3
    image_size: Annotated[int, Within(1, 1024)] = 224
    patch_size: Annotated[int, Within(1, 1024)] = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5

    neutral: ClassVar = {"hidden_act": set(ACTIVATIONS), "num_channels": {3}}
    causal: ClassVar = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_divides("num_attention_heads", self.num_attention_heads, (self.hidden_size,))
        if self.patch_size > self.image_size:
            raise CheckpointError(
                f"{type(self).__name__}: patch_size={self.patch_size} is more than image_size={self.image_size}"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Takes the fields above; a transformers config is full of others, which do not change the result."""
        return super().from_dict({k: v for k, v in config.items() if k in cls.__dataclass_fields__})


class Embeddings(nnx.Module):
    """The class embedding and one embedding per patch, each plus that of its position: [B H W 3] -> [B 1+N D]"""

    def __init__(self, config: CLIPVisionConfig, **kw: Unpack[LayerArgs]):
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nnx.Param(jnp.zeros(width, kw.get("param_dtype", jnp.float32)))
        self.patch_embedding = conv(config.num_channels, width, patch, stride=patch, padding=0, use_bias=False, **kw)
        self.position_embedding = embedding((config.image_size // patch) ** 2 + 1, width, **kw)

    def __call__(self, pixels: Array) -> Array:
        patches = self.patch_embedding(pixels)  # [B h w D]
        B, h, w, D = patches.shape
        first = jnp.broadcast_to(self.class_embedding[...], (B, 1, D)).astype(patches.dtype)
        x = jnp.concatenate([first, patches.reshape(B, h * w, D)], axis=1)
        return x + self.position_embedding(jnp.arange(1 + h * w))


class VisionTransformer(nnx.Module):
    """[B S S 3] pixels -> [B D], the last layer's normalised state of the class embedding"""

    def __init__(self, config: CLIPVisionConfig, **kw: Unpack[LayerArgs]):
        self.embeddings = Embeddings(config, **kw)
        self.pre_layrnorm = layer_norm(config.hidden_size, eps=config.layer_norm_eps, **kw)  # spelled like this
        self.encoder = Encoder(config, **kw)
        self.post_layernorm = layer_norm(config.hidden_size, eps=config.layer_norm_eps, **kw)

    def __call__(self, pixels: Array) -> Array:
        return self.post_layernorm(self.states(pixels, len(self.encoder.layers))[:, 0])

    def states(self, pixels: Array, layers: int) -> Array:
        """[B S S 3] pixels -> [B 1+N D], the states of the class embedding and of the patches after so many layers"""
        return self.encoder(self.pre_layrnorm(self.embeddings(pixels)), 0, layers)


@dataclass(frozen=True)
class CLIPVisionModelConfig(CLIPVisionConfig):
    """The same of a model with a projection."""

    projection_dim: Channels = 512


class CLIPVisionModelWithProjection(Model):
    """Pictures [B S S 3], resized and normalised -> embeddings [B P], in the space of the texts'"""

    config_class = CLIPVisionModelConfig
    weights_stem = "model"
    ignored = r"position_ids$"

    def __init__(self, config: CLIPVisionModelConfig, **kw: Unpack[LayerArgs]):
        self.config = config
        self.vision_model = VisionTransformer(config, **kw)
        self.visual_projection = linear(config.hidden_size, config.projection_dim, use_bias=False, **kw)

    def __call__(self, pixels: Array) -> Array:
        return self.visual_projection(self.vision_model(pixels))

    def penultimate(self, pixels: Array) -> Array:
        """The states before the last layer, which is not computed: [B 1+N D]"""
        return self.vision_model.states(pixels, self.config.num_hidden_layers - 1)

    def config_header(self) -> dict[str, Any]:
        """What transformers reads to know the class, and to load in float32, as diffusers does, any weights."""
        return {"architectures": [type(self).__name__], "model_type": "clip_vision_model", "dtype": "float32"}
