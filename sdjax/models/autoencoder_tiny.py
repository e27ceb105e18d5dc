"""TAESD, the tiny autoencoder: convolutions distilled from Stable Diffusion's (github.com/madebyollin/taesd)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self, Unpack

import jax.numpy as jnp
from flax import nnx
from jax import Array

from sdjax.checkpoints.errors import CheckpointError
from sdjax.fields import Channels, Levels, Scale, Within
from sdjax.models.base import Model, ModelConfig
from sdjax.models.layers import LayerArgs, conv
from sdjax.models.vae import DiagonalGaussian

Blocks = Annotated[int, Within(0, 16)]


@dataclass(frozen=True)
class AutoencoderTinyConfig(ModelConfig):
    """The fields of a diffusers AutoencoderTiny's `config.json`, with its defaults.

    latent_magnitude and latent_shift only serve to store latents as pixels; nothing here depends on them.
    Without num_encoder_blocks it is a decoder alone.
    Raises CheckpointError for levels of different widths, and where encoding and decoding change the size differently.
    """

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: Annotated[tuple[Channels, ...], Within(0, 6)] = (64, 64, 64, 64)
    decoder_block_out_channels: Annotated[tuple[Channels, ...], Levels] = (64, 64, 64, 64)
    act_fn: str = "relu"
    upsample_fn: str = "nearest"
    latent_channels: Channels = 4
    upsampling_scaling_factor: Annotated[int, Within(1, 4)] = 2
    num_encoder_blocks: Annotated[tuple[Blocks, ...], Within(0, 6)] = (1, 3, 3, 3)
    num_decoder_blocks: Annotated[tuple[Blocks, ...], Levels] = (3, 3, 3, 1)
    latent_magnitude: float = 3
    latent_shift: float = 0.5
    force_upcast: bool = False
    scaling_factor: Scale = 1.0
    shift_factor: float = 0.0

    neutral: ClassVar = {"act_fn": {"relu"}, "upsample_fn": {"nearest"}, "shift_factor": {0.0}}

    def __post_init__(self) -> None:
        super().__post_init__()
        for side in ("encoder", "decoder"):
            widths, blocks = getattr(self, f"{side}_block_out_channels"), getattr(self, f"num_{side}_blocks")
            if len(set(widths)) > 1 or len(widths) != len(blocks):
                raise CheckpointError(
                    f"AutoencoderTinyConfig: not implemented: {side}_block_out_channels={widths} with "
                    f"num_{side}_blocks={blocks}; every level must have the same width"
                )
        shrinking = 2 ** (len(self.num_encoder_blocks) - 1)
        if self.num_encoder_blocks and shrinking != self.factor:
            raise CheckpointError(
                f"AutoencoderTinyConfig: not implemented: encoding makes pictures {shrinking} times smaller, decoding "
                f"makes latents {self.factor} times larger"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """`block_out_channels`, which diffusers derives and writes as well, is redundant."""
        return super().from_dict({k: v for k, v in config.items() if k != "block_out_channels"})

    is_variational: ClassVar = False

    def unscaled(self, latents: Array) -> Array:
        """Latents as the denoiser has them -> as the autoencoder has them."""
        return latents / self.scaling_factor

    def scaled(self, latents: Array) -> Array:
        """The inverse of `unscaled`."""
        return latents * self.scaling_factor

    @property
    def factor(self) -> int:
        """Pixels of a picture per pixel of its latents, along each side."""
        return self.upsampling_scaling_factor ** (len(self.num_decoder_blocks) - 1)

    @property
    def last_channels(self) -> int:
        """Of the decoder's last level, which has the size of the picture."""
        return self.decoder_block_out_channels[-1]


class Block(nnx.Module):
    """relu(x + conv(relu(conv(relu(conv(x))))))"""

    def __init__(self, channels: int, **kw: Unpack[LayerArgs]):
        first, second, third = (conv(channels, channels, 3, **kw) for _ in range(3))
        self.conv = nnx.List([first, nnx.relu, second, nnx.relu, third])

    def __call__(self, x: Array) -> Array:
        return nnx.relu(x + chain(self.conv, x))


class Upsample(nnx.Module):
    """Nearest neighbour: [B H W C] -> [B fH fW C]"""

    def __init__(self, factor: int):
        self.factor = factor

    def __call__(self, x: Array) -> Array:
        return x.repeat(self.factor, axis=1).repeat(self.factor, axis=2)


def chain(layers: nnx.List, x: Array) -> Array:
    """One layer after the other. The lists hold activations too: checkpoints count them."""
    for layer in layers:
        x = layer(x)
    return x


class Encoder(nnx.Module):
    """[B H W 3] in [-1, 1] -> [B H/f W/f C]: blocks at each level, between levels a convolution of stride 2"""

    def __init__(self, config: AutoencoderTinyConfig, **kw: Unpack[LayerArgs]):
        width = config.encoder_block_out_channels[0]
        self.layers = nnx.List([])
        for level, blocks in enumerate(config.num_encoder_blocks):
            if level == 0:
                self.layers.append(conv(config.in_channels, width, 3, **kw))
            else:
                self.layers.append(conv(width, width, 3, stride=2, use_bias=False, **kw))
            self.layers.extend(Block(width, **kw) for _ in range(blocks))
        self.layers.append(conv(width, config.latent_channels, 3, **kw))

    def __call__(self, x: Array) -> Array:
        return chain(self.layers, x / 2 + 0.5)


class Decoder(nnx.Module):
    """[B h w C] -> [B h*f w*f 3] in [-1, 1]: blocks at each level, between levels a larger size and a convolution

    Latents are bounded by 3 tanh(z / 3) first.
    """

    def __init__(self, config: AutoencoderTinyConfig, **kw: Unpack[LayerArgs]):
        width, levels = config.decoder_block_out_channels[0], len(config.num_decoder_blocks)
        self.layers = nnx.List([conv(config.latent_channels, width, 3, **kw), nnx.relu])
        for level, blocks in enumerate(config.num_decoder_blocks):
            self.layers.extend(Block(width, **kw) for _ in range(blocks))
            if level < levels - 1:
                self.layers.append(Upsample(config.upsampling_scaling_factor))
                self.layers.append(conv(width, width, 3, use_bias=False, **kw))
        self.layers.append(conv(width, config.out_channels, 3, **kw))

    def __call__(self, z: Array) -> Array:
        return chain(self.layers, 3 * jnp.tanh(z / 3)) * 2 - 1


class AutoencoderTiny(Model):
    """Pictures [B H W 3] in [-1, 1] to latents [B H/f W/f C] and back, at a fraction of AutoencoderKL's work.

    Stands wherever an AutoencoderKL does. Its latents have the denoiser's scale: `config.scaling_factor` is 1.
    `encoder` is None for a decoder alone, as TAESD's own files have it, which is enough for previews.
    """

    config_class = AutoencoderTinyConfig

    def __init__(self, config: AutoencoderTinyConfig, **kw: Unpack[LayerArgs]):
        self.config = config
        self.encoder = Encoder(config, **kw) if config.num_encoder_blocks else None
        self.decoder = Decoder(config, **kw)

    def encode(self, images: Array) -> DiagonalGaussian:
        """Images [B H W 3] in [-1, 1] -> latents [B H/f W/f C], a Gaussian of variance 0: each sample is the mean."""
        latents = self.encoder(images)
        return DiagonalGaussian(latents, jnp.full_like(latents, -jnp.inf))

    def decode(self, latents: Array) -> Array:
        """Latents [B h w C] -> images [B h*f w*f 3], about [-1, 1]"""
        return self.decoder(latents)
