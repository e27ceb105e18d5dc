"""The text encoder of CLIP (arXiv:2103.00020): token ids to one state per token and one for all of them."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, NamedTuple, Self, Unpack

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from sdjax.checkpoints.variables import get_value, set_value
from sdjax.fields import Channels, Epsilon, Id, Within, checked
from sdjax.models.attention import split_heads
from sdjax.models.base import Model, ModelConfig
from sdjax.models.layers import LayerArgs, embedding, layer_norm, linear, recomputed
from sdjax.ops.activations import gelu, quick_gelu
from sdjax.ops.attention import attention

ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}
WITH_PROJECTION = "CLIPTextModelWithProjection"
WHOLE = ("text_config_dict", "text_config")
"""The text encoder's part of the config of a CLIP that has an image encoder too; the latter counts"""
OTHER_HALF = re.compile(r"vision_model\.|visual_projection\.|logit_scale$")
PADDING_MASK = "use_attention_mask"  # an option of pipelines: padding is not attended to
Layers = Annotated[int, Within(1, 64)]
LEGACY_EOS = 2  # in configs from before transformers 4.31, whatever the vocabulary


@dataclass(frozen=True)
class CLIPTextConfig(ModelConfig):
    """The fields of a transformers `text_encoder/config.json`, with its defaults.

    `projection_dim` is None for a model that has no text projection.
    """

    vocab_size: Annotated[int, Within(1, 2**22)] = 49408
    hidden_size: Channels = 512
    intermediate_size: Channels = 2048
    num_hidden_layers: Layers = 12
    num_attention_heads: Channels = 8
    max_position_embeddings: Annotated[int, Within(1, 4096)] = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5
    bos_token_id: Id | None = 49406
    eos_token_id: Id = 49407
    pad_token_id: Id | None = 1
    projection_dim: Channels | None = None

    neutral: ClassVar = {"hidden_act": set(ACTIVATIONS)}
    causal: ClassVar = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_divides("num_attention_heads", self.num_attention_heads, (self.hidden_size,))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Takes the fields above; a transformers config is full of others, which do not change the text states.

        Every config has a `projection_dim` (512 where it is left out); `architectures` decides whether there is one.
        Of a whole CLIP (transformers' CLIPConfig) it takes the text encoder's part, which old ones have twice.
        """
        if _is_whole(config):
            for key in WHOLE:
                checked(key, config.get(key), dict[str, Any] | None)
            outer = {key: config[key] for key in ("architectures", "projection_dim") if key in config}
            parts = [config.get(key) or {} for key in WHOLE]
            config = {**parts[0], **parts[1], **outer}
        values = {k: v for k, v in config.items() if k in (*cls.__dataclass_fields__, PADDING_MASK)}
        width = config.get("projection_dim", 512) if _is_projected(config) else None
        return super().from_dict(values | {"projection_dim": width})

    @property
    def pooled_width(self) -> int:
        """Channels of the pooled text."""
        return self.projection_dim or self.hidden_size

    def to_dict(self) -> dict[str, Any]:
        """The fields as `config.json` spells them."""
        return {k: v for k, v in super().to_dict().items() if v is not None}


def _is_whole(config: Mapping[str, Any]) -> bool:
    return any(key in config for key in WHOLE)


def _is_projected(config: Mapping[str, Any]) -> bool:
    names = config.get("architectures")
    return isinstance(names, list | tuple) and WITH_PROJECTION in names


class Embeddings(nnx.Module):
    """token_embedding[ids] + position_embedding[0..L]: [B L] -> [B L D]

    Ids from the size of the vocabulary on are rows of `added` [N D].
    """

    def __init__(self, config: CLIPTextConfig, **kw: Unpack[LayerArgs]):
        self.token_embedding = embedding(config.vocab_size, config.hidden_size, **kw)
        self.position_embedding = embedding(config.max_position_embeddings, config.hidden_size, **kw)

    def __call__(self, input_ids: Array, added: Array | None = None) -> Array:
        length, positions = input_ids.shape[1], self.position_embedding.num_embeddings
        if length > positions:
            raise ValueError(f"{length} tokens, but {positions} positions")
        return self._tokens(input_ids, added) + self.position_embedding(jnp.arange(length))

    def _tokens(self, input_ids: Array, added: Array | None) -> Array:
        if added is None:
            return self.token_embedding(input_ids)
        size = self.token_embedding.num_embeddings
        known = self.token_embedding(jnp.minimum(input_ids, size - 1))
        new = jnp.take(added, jnp.maximum(input_ids - size, 0), axis=0).astype(known.dtype)
        return jnp.where(input_ids[..., None] < size, known, new)


class SelfAttention(nnx.Module):
    """Multi-head attention, causal where config.causal is set: [B L D] -> [B L D]"""

    def __init__(self, config: CLIPTextConfig, **kw: Unpack[LayerArgs]):
        width = config.hidden_size
        self.heads, self.causal = config.num_attention_heads, config.causal
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (linear(width, width, **kw) for _ in range(4))

    def __call__(self, x: Array) -> Array:
        q, k, v = (split_heads(project(x), self.heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(q, k, v, causal=self.causal).reshape(x.shape))


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

    is_recomputed = False

    def __init__(self, config: CLIPTextConfig, **kw: Unpack[LayerArgs]):
        self.layer_norm1 = layer_norm(config.hidden_size, eps=config.layer_norm_eps, **kw)
        self.self_attn = SelfAttention(config, **kw)
        self.layer_norm2 = layer_norm(config.hidden_size, eps=config.layer_norm_eps, **kw)
        self.mlp = MLP(config, **kw)

    @recomputed
    def __call__(self, x: Array) -> Array:
        x += self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    """The stack of layers: [B L D] -> [B L D]"""

    def __init__(self, config: CLIPTextConfig, **kw: Unpack[LayerArgs]):
        self.layers = nnx.List(EncoderLayer(config, **kw) for _ in range(config.num_hidden_layers))

    def __call__(self, x: Array, first: int, end: int) -> Array:
        """The layers from `first` up to, not including, `end`."""
        for i in range(first, end):
            x = self.layers[i](x)
        return x


class TextTransformer(nnx.Module):
    """Embeddings, layers and the final normalisation."""

    def __init__(self, config: CLIPTextConfig, **kw: Unpack[LayerArgs]):
        self.embeddings = Embeddings(config, **kw)
        self.encoder = Encoder(config, **kw)
        self.final_layer_norm = layer_norm(config.hidden_size, eps=config.layer_norm_eps, **kw)


class TextOutput(NamedTuple):
    """states [B L D]: one per token. pooled [B P], or [B D] of a model without a projection: one per text."""

    states: Array
    pooled: Array


class CLIPTextModel(Model):
    """[B L] token ids -> [B L D] states of a layer, normalised by final_layer_norm

    layer=-1: the last layer; -2: the penultimate (the layers above it are not computed). A config with `projection_dim`
    makes it what transformers calls CLIPTextModelWithProjection.
    """

    config_class = CLIPTextConfig
    weights_stem = "model"
    # transformers 5 saves without the prefix that every published checkpoint has
    renames = ((r"^(?=embeddings\.|encoder\.|final_layer_norm\.)", "text_model."),)
    ignored = r"position_ids$|^text_projection\."  # of a model without, as in transformers

    def __init__(self, config: CLIPTextConfig, **kw: Unpack[LayerArgs]):
        self.config = config
        width, projected = config.hidden_size, config.projection_dim
        self.text_model = TextTransformer(config, **kw)
        self.text_projection = linear(width, projected, use_bias=False, **kw) if projected else None

    def __call__(self, input_ids: Array, layer: int = -1) -> Array:
        text = self.text_model
        return text.final_layer_norm(text.encoder(text.embeddings(input_ids), 0, self._depth(layer)))

    def with_embeddings(self, added: Array | np.ndarray) -> Self:
        """The model in which the ids vocab_size, vocab_size + 1, … have these embeddings [N D] too."""
        model = nnx.merge(*nnx.split(self))
        table = model.text_model.embeddings.token_embedding
        rows = get_value(table.embedding)
        set_value(table.embedding, jnp.concatenate([rows, jnp.asarray(added, rows.dtype)]))
        table.num_embeddings += len(added)
        model.config = replace(self.config, vocab_size=table.num_embeddings)
        return model

    def encode(
        self,
        input_ids: Array,
        *,
        layer: int = -1,
        normalize: bool = True,
        added_embeddings: Array | None = None,
        vocab_size: int | None = None,
    ) -> TextOutput:
        """[B L] token ids -> states of a layer, normalised by final_layer_norm or not, and the pooled text

        pooled = text_projection(final_layer_norm(last layer's state of the first end-of-text token)).
        added_embeddings [N D]: the embeddings of the ids config.vocab_size, config.vocab_size + 1, …
        vocab_size: ids from here on are learned words, which do not end a text; None: from config.vocab_size on.
        """
        text, depth = self.text_model, self._depth(layer)
        x = text.encoder(text.embeddings(input_ids, added_embeddings), 0, depth)
        last = text.final_layer_norm(text.encoder(x, depth, self.config.num_hidden_layers))
        pooled = jnp.take_along_axis(
            last, self._ends(input_ids, vocab_size or self.config.vocab_size)[:, None, None], axis=1
        )[:, 0]
        if self.text_projection is not None:
            pooled = self.text_projection(pooled)
        return TextOutput(text.final_layer_norm(x) if normalize else x, pooled)

    @classmethod
    def _own(
        cls, config: Mapping[str, Any], tensors: Iterable[tuple[str, np.ndarray]]
    ) -> Iterable[tuple[str, np.ndarray]]:
        """Of a whole CLIP's tensors those of the text encoder, as transformers' classes take them."""
        if not _is_whole(config):
            return tensors
        left_out = OTHER_HALF if _is_projected(config) else re.compile(rf"{OTHER_HALF.pattern}|text_projection\.")
        return ((name, array) for name, array in tensors if not left_out.match(name))

    def _depth(self, layer: int) -> int:
        """How many layers there are up to a state counted from the end. Raises ValueError if there is no such state."""
        layers = self.config.num_hidden_layers
        if not -layers - 1 <= layer <= -1:
            raise ValueError(f"layer={layer}: the states of {layers} layers are -1 to {-layers - 1}")
        return layers + 1 + layer

    def _ends(self, input_ids: Array, vocab_size: int) -> Array:
        """[B L] -> [B] index of the first end-of-text token; with the legacy id, of the largest of the vocabulary.

        PyTorch takes the largest of all, which is a learned word where the text has one.
        """
        eos = self.config.eos_token_id
        legacy = jnp.where(input_ids < vocab_size, input_ids, -1)
        return jnp.argmax(legacy if eos == LEGACY_EOS else input_ids == eos, axis=1)

    def config_header(self) -> dict[str, Any]:
        """What transformers reads to know the class, and to load in float32, as diffusers does, any weights."""
        name = WITH_PROJECTION if self.config.projection_dim else "CLIPTextModel"
        return {"architectures": [name], "model_type": "clip_text_model", "dtype": "float32"}
