"""The text encoder of CLIP (arXiv:2103.00020): token ids to one state per token."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sdjax.models.attention import attention, split_heads
from sdjax.models.base import Model, ModelConfig
from sdjax.models.layers import LayerArgs, embedding, layer_norm, linear


def quick_gelu(x: Array) -> Array:
    """x * sigmoid(1.702 x)"""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": lambda x: jax.nn.gelu(x, approximate=False)}


@dataclass(frozen=True)
class CLIPTextConfig(ModelConfig):
    """The fields of a transformers `text_encoder/config.json`, with its defaults."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 1

    neutral: ClassVar = {"hidden_act": set(ACTIVATIONS)}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Takes the fields above; a transformers config is full of others, which do not change the text states."""
        return super().from_dict({k: v for k, v in config.items() if k in cls.__dataclass_fields__})


class Embeddings(nnx.Module):
    """token_embedding[ids] + position_embedding[0..L]: [B L] -> [B L D]"""

    def __init__(self, config: CLIPTextConfig, **kw: Unpack[LayerArgs]):
        self.token_embedding = embedding(config.vocab_size, config.hidden_size, **kw)
        self.position_embedding = embedding(config.max_position_embeddings, config.hidden_size, **kw)

    def __call__(self, input_ids: Array) -> Array:
        length, positions = input_ids.shape[1], self.position_embedding.num_embeddings
        if length > positions:
            raise ValueError(f"{length} tokens, but {positions} positions")
        return self.token_embedding(input_ids) + self.position_embedding(jnp.arange(length))


class SelfAttention(nnx.Module):
    """Causal multi-head attention: [B L D] -> [B L D]"""

    def __init__(self, config: CLIPTextConfig, **kw: Unpack[LayerArgs]):
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (linear(width, width, **kw) for _ in range(4))

    def __call__(self, x: Array) -> Array:
        q, k, v = (split_heads(project(x), self.heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(q, k, v, causal=True).reshape(x.shape))


class MLP(nnx.Module):
    """fc2(act(fc1(x)))"""

    def __init__(self, config: CLIPTextConfig, **kw: Unpack[LayerArgs]):
        self.act = ACTIVATIONS[config.hidden_act]
        self.fc1 = linear(config.hidden_size, config.intermediate_size, **kw)
        self.fc2 = linear(config.intermediate_size, config.hidden_size, **kw)

    def __call__(self, x: Array) -> Array:
        return self.fc2(self.act(self.fc1(x)))


class EncoderLayer(nnx.Module):
    """x += self_attn(layer_norm1(x)); x += mlp(layer_norm2(x))"""

    def __init__(self, config: CLIPTextConfig, **kw: Unpack[LayerArgs]):
        self.layer_norm1 = layer_norm(config.hidden_size, eps=config.layer_norm_eps, **kw)
        self.self_attn = SelfAttention(config, **kw)
        self.layer_norm2 = layer_norm(config.hidden_size, eps=config.layer_norm_eps, **kw)
        self.mlp = MLP(config, **kw)

    def __call__(self, x: Array) -> Array:
        x += self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    """The stack of layers."""

    def __init__(self, config: CLIPTextConfig, **kw: Unpack[LayerArgs]):
        self.layers = nnx.List(EncoderLayer(config, **kw) for _ in range(config.num_hidden_layers))


class TextTransformer(nnx.Module):
    """Embeddings, layers and the final normalisation."""

    def __init__(self, config: CLIPTextConfig, **kw: Unpack[LayerArgs]):
        self.embeddings = Embeddings(config, **kw)
        self.encoder = Encoder(config, **kw)
        self.final_layer_norm = layer_norm(config.hidden_size, eps=config.layer_norm_eps, **kw)


class CLIPTextModel(Model):
    """[B L] token ids -> [B L D] states of a layer, normalised by final_layer_norm

    layer=-1: the last layer; -2: the penultimate (the layers above it are not computed).
    """

    config_class = CLIPTextConfig
    weights_stem = "model"
    # transformers 5 saves without the prefix that every published checkpoint has
    renames = ((r"^(?=embeddings\.|encoder\.|final_layer_norm\.)", "text_model."),)
    ignored = r"position_ids$"

    def __init__(self, config: CLIPTextConfig, **kw: Unpack[LayerArgs]):
        self.config = config
        self.text_model = TextTransformer(config, **kw)

    def __call__(self, input_ids: Array, layer: int = -1) -> Array:
        text, layers = self.text_model, self.text_model.encoder.layers
        x = text.embeddings(input_ids)
        for i in range(len(layers) + 1 + layer):
            x = layers[i](x)
        return text.final_layer_norm(x)

    def config_header(self) -> dict[str, Any]:
        """What transformers reads to know the class."""
        return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
