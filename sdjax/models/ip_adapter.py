"""IP-Adapter (arXiv:2308.06721): pictures as prompts, to which the UNet's cross-attentions attend beside the text.

What they attend to depends neither on the sample nor on the timestep, so that keys and values are computed once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self, Unpack

import jax.numpy as jnp
from flax import nnx
from jax import Array

from sdjax.checkpoints import ip_adapter
from sdjax.checkpoints.errors import CheckpointError
from sdjax.checkpoints.folder import torch_shape, variables
from sdjax.checkpoints.lora import Layers
from sdjax.fields import Channels, Within
from sdjax.models.attention import KeysValues, Pictures, split_heads
from sdjax.models.base import Model, ModelConfig
from sdjax.models.clip_vision import CLIPVisionModelWithProjection
from sdjax.models.layers import LayerArgs, layer_norm, linear
from sdjax.models.unet import UNet2DConditionModel
from sdjax.models.unet_blocks import at
from sdjax.ops.activations import gelu
from sdjax.ops.attention import attention

HEAD = 64  # channels of each of the resampler's heads


@dataclass(frozen=True)
class IPAdapterConfig(ModelConfig):
    """What the shapes in an IP-Adapter's file, which has no `config.json`, say, and the UNet that it is for.

    `kind` is "plain", "plus" (its resampler has `depth` layers of `width` channels, attention of `inner`), "full", or
    "face", of embeddings of faces' identities (FaceID; `width` channels inside). `layers`: the names and the channels
    of the UNet's transformer blocks, in the order of PyTorch.
    """

    kind: str
    image_channels: Channels
    context_channels: Channels
    layers: tuple[tuple[str, Channels], ...]
    tokens: Channels = 4
    width: Channels = 768
    inner: Channels = 768
    depth: Annotated[int, Within(1, 16)] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inner % HEAD:
            raise CheckpointError(f"{type(self).__name__}: heads of {HEAD} channels do not make {self.inner}")

    @property
    def takes_states(self) -> bool:
        """Whether it takes the states of a picture's patches, not its embedding."""
        return self.kind in ("plus", "full")


class ImageProjection(nnx.Module):
    """norm(proj(x)), a few tokens of the embedding of a picture: [B P] -> [B T D]"""

    def __init__(self, config: IPAdapterConfig, **kw: Unpack[LayerArgs]):
        self.tokens = config.tokens
        self.proj = linear(config.image_channels, config.tokens * config.context_channels, **kw)
        self.norm = layer_norm(config.context_channels, **kw)

    def __call__(self, x: Array) -> Array:
        return self.norm(self.proj(x).reshape(len(x), self.tokens, -1))


class FullProjection(nnx.Module):
    """norm(linear(gelu(linear(x)))), a token of each patch: [B T P] -> [B T D]"""

    def __init__(self, config: IPAdapterConfig, **kw: Unpack[LayerArgs]):
        width, channels = config.image_channels, config.context_channels
        layers = {"0": linear(width, width, **kw), "2": linear(width, channels, **kw), "3": layer_norm(channels, **kw)}
        self.proj = nnx.Dict(layers)

    def __call__(self, x: Array) -> Array:
        return self.proj["3"](self.proj["2"](gelu(self.proj["0"](x))))


class FaceProjection(nnx.Module):
    """norm(linear(gelu(linear(x)))), a few tokens of the embedding of a face: [B P] -> [B T D]"""

    def __init__(self, config: IPAdapterConfig, **kw: Unpack[LayerArgs]):
        self.tokens, width, channels = config.tokens, config.width, config.context_channels
        last = linear(width, config.tokens * channels, **kw)
        self.proj = nnx.Dict({"0": linear(config.image_channels, width, **kw), "2": last})
        self.norm = layer_norm(channels, **kw)

    def __call__(self, x: Array) -> Array:
        return self.norm(self.proj["2"](gelu(self.proj["0"](x))).reshape(len(x), self.tokens, -1))


class PerceiverAttention(nnx.Module):
    """to_out(attention of norm2(latents) to norm1(x) and itself): [B L W], [B T W] -> [B L W] (arXiv:2204.14198)"""

    def __init__(self, config: IPAdapterConfig, **kw: Unpack[LayerArgs]):
        width, inner = config.width, config.inner
        self.heads = inner // HEAD
        self.norm1, self.norm2 = layer_norm(width, **kw), layer_norm(width, **kw)
        self.to_q = linear(width, inner, use_bias=False, **kw)
        self.to_kv = linear(width, 2 * inner, use_bias=False, **kw)
        self.to_out = linear(inner, width, use_bias=False, **kw)

    def __call__(self, latents: Array, x: Array) -> Array:
        latents = self.norm2(latents)
        seen = jnp.concatenate([self.norm1(x), latents], axis=1)
        q, k, v = (split_heads(y, self.heads) for y in (self.to_q(latents), *jnp.split(self.to_kv(seen), 2, axis=-1)))
        return self.to_out(attention(q, k, v).reshape(*latents.shape[:2], -1))


class Resampler(nnx.Module):
    """The states of the patches of a picture, gathered by learned latents: [B T P] -> [B L D]

    latents += attention(latents, proj_in(x)), latents += linear(gelu(linear(norm(latents)))), and again; then
    norm_out(proj_out(latents)).
    """

    def __init__(self, config: IPAdapterConfig, **kw: Unpack[LayerArgs]):
        width = config.width
        self.latents = nnx.Param(jnp.zeros((1, config.tokens, width), kw.get("param_dtype", jnp.float32)))
        self.proj_in = linear(config.image_channels, width, **kw)
        self.layers = nnx.List(
            nnx.List([PerceiverAttention(config, **kw), self._feed_forward(width, **kw)]) for _ in range(config.depth)
        )
        self.proj_out = linear(width, config.context_channels, **kw)
        self.norm_out = layer_norm(config.context_channels, **kw)

    def __call__(self, x: Array) -> Array:
        x = self.proj_in(x)
        latents = jnp.repeat(self.latents[...], len(x), axis=0).astype(x.dtype)
        for attend, layers in self.layers:
            latents += attend(latents, x)
            latents += layers["3"](gelu(layers["1"](layers["0"](latents))))
        return self.norm_out(self.proj_out(latents))

    def _feed_forward(self, width: int, **kw: Unpack[LayerArgs]) -> nnx.Dict:
        """Checkpoints count the activation as 2."""
        up, down = (linear(*size, use_bias=False, **kw) for size in ((width, 4 * width), (4 * width, width)))
        return nnx.Dict({"0": layer_norm(width, **kw), "1": up, "3": down})


PROJECTIONS = {"plain": ImageProjection, "plus": Resampler, "full": FullProjection, "face": FaceProjection}


class Projections(nnx.Module):
    """to_k_ip(tokens), scale * to_v_ip(tokens): [B N D], [B 1 1] -> [B N C] each, those of one cross-attention"""

    def __init__(self, cin: int, cout: int, **kw: Unpack[LayerArgs]):
        self.to_k_ip, self.to_v_ip = (linear(cin, cout, use_bias=False, **kw) for _ in range(2))

    def __call__(self, tokens: Array, scale: Array) -> KeysValues:
        values = self.to_v_ip(tokens)
        return KeysValues(self.to_k_ip(tokens), (scale * values).astype(values.dtype))


class IPAdapter(Model):
    """What `seen_by` gives [B n P] or [B n T P] -> the keys and values of the UNet's cross-attentions, [B n*tokens C]

    Values are times the scale [B N] of each image in each of N transformer blocks: attention is linear in them.
    """

    config_class = IPAdapterConfig

    def __init__(self, config: IPAdapterConfig, **kw: Unpack[LayerArgs]):
        self.config = config
        self.image_proj = PROJECTIONS[config.kind](config, **kw)
        layers = enumerate(config.layers)
        self.ip_adapter = nnx.Dict(
            {_number(i): Projections(config.context_channels, channels, **kw) for i, (_, channels) in layers}
        )

    @classmethod
    def of_file(cls, path: Path, unet: UNet2DConditionModel) -> tuple[Self, Layers]:
        """That of a file, for this UNet and in its dtype, and the LoRA that goes with it, {} if there is none.

        Raises CheckpointError for one that does not fit.
        """
        found = ip_adapter.read(path, at(unet.config.cross_attention_dim, 0))
        blocks = unet.transformer_blocks()
        layers = [(name, block.attn2.to_k.out_features) for name, block in blocks.items()]
        shapes = {name: torch_shape(name, variable.shape) for name, variable in variables(unet).items()}
        lora, values = ip_adapter.lora(path, found, list(blocks), shapes), found.config | {"layers": layers}
        return cls.from_tensors(values, found.tensors.items(), source=str(path), dtype=unet.conv_in.dtype), lora

    def check_encoder(self, encoder: CLIPVisionModelWithProjection) -> None:
        """Raises CheckpointError for the image encoder of another IP-Adapter. One of faces needs none."""
        if self.config.kind == "face":
            return
        states = self.config.takes_states
        given = encoder.config.hidden_size if states else encoder.config.projection_dim
        if given != (taken := self.config.image_channels):
            raise CheckpointError(
                f"the image encoder gives {'states' if states else 'embeddings'} of width {given}, where the adapter "
                f"takes {taken}: it was made with another; see image_encoder_folder"
            )

    def __call__(self, seen: Array, scale: Array) -> dict[str, KeysValues]:
        B, n = seen.shape[:2]
        tokens = self.image_proj(seen.reshape(B * n, *seen.shape[2:]))
        tokens = tokens.reshape(B, -1, tokens.shape[-1])
        return {
            name: self.ip_adapter[_number(i)](tokens, scale[:, i, None, None])
            for i, (name, _) in enumerate(self.config.layers)
        }


def _number(i: int) -> str:
    """PyTorch counts all attentions, of which every second one is a cross-attention."""
    return str(2 * i + 1)


def seen_by(encoder: CLIPVisionModelWithProjection, pictures: Array, *, takes_states: bool, is_negative: bool) -> Array:
    """Pictures [B n S S 3] as CLIP sees them -> their embeddings [B n P], or the states of their patches [B n T P]

    is_negative: beside the negative prompt, where the embedding is zero, or the picture has the mean colour.
    """
    B, n = pictures.shape[:2]
    pixels = pictures.reshape(B * n, *pictures.shape[2:])
    pixels = jnp.zeros_like(pixels[:1]) if is_negative else pixels
    seen = encoder.penultimate(pixels) if takes_states else encoder(pixels)
    seen = jnp.zeros_like(seen) if is_negative and not takes_states else seen
    return jnp.broadcast_to(seen, (B * n, *seen.shape[1:])).reshape(B, n, *seen.shape[1:])


def pictures_of(
    adapters: Sequence[IPAdapter], seen: Sequence[Array], scales: Array, masks: Sequence[Mapping[str, Array]] | None
) -> Pictures:
    """What the UNet is given for what is seen [B n P] or [B n T P] and the scales [B A N] of A adapters.

    masks: of each picture, [B n L] for the L pixels of each transformer block: it is attended to by itself.
    """
    made: dict[str, list[KeysValues]] = {}
    for i, (adapter, own) in enumerate(zip(adapters, seen, strict=True)):
        for name, found in adapter(own, scales[:, i]).items():
            made.setdefault(name, []).extend([found] if masks is None else found.apart(masks[i][name]))
    return made
