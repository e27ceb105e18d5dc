"""The variational autoencoder between pictures and latents (arXiv:2112.10752, appendix G)."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, ClassVar, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from sdjax.checkpoints.errors import CheckpointError
from sdjax.fields import Channels, Levels, Scale, Within
from sdjax.models.attention import SpatialAttention
from sdjax.models.base import Model, ModelConfig
from sdjax.models.layers import Downsample, GroupNorm, LayerArgs, ResnetBlock, Upsample, conv
from sdjax.ops.activations import silu

EPS = 1e-6


@dataclass(frozen=True)
class AutoencoderKLConfig(ModelConfig):
    """The fields of a diffusers `vae/config.json`, with its defaults."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: Annotated[tuple[str, ...], Levels] = ("DownEncoderBlock2D",)
    up_block_types: Annotated[tuple[str, ...], Levels] = ("UpDecoderBlock2D",)
    block_out_channels: Annotated[tuple[Channels, ...], Levels] = (64,)
    layers_per_block: Annotated[int, Within(1, 8)] = 1
    act_fn: str = "silu"
    latent_channels: Channels = 4
    norm_num_groups: Channels = 32
    sample_size: Annotated[int, Within(1, 8192)] = 32
    scaling_factor: Scale = 0.18215
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    latents_mean: tuple[Annotated[float, Within(-1e6, 1e6)], ...] | None = None
    latents_std: tuple[Scale, ...] | None = None
    """of each channel; both or none"""

    neutral: ClassVar = {
        "down_block_types": {"DownEncoderBlock2D"},
        "up_block_types": {"UpDecoderBlock2D"},
        "act_fn": {"silu", "swish"},
    }
    unsupported: ClassVar = {"shift_factor": 0.0}
    is_variational: ClassVar = True
    per_level: ClassVar = ("block_out_channels", "down_block_types", "up_block_types")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_divides("norm_num_groups", self.norm_num_groups, self.block_out_channels)
        mean, std = self.latents_mean, self.latents_std
        if (mean, std) != (None, None) and not len(mean or ()) == len(std or ()) == self.latent_channels:
            raise CheckpointError(
                f"{type(self).__name__}: latents_mean={mean}, latents_std={std}: not a number of each for each of "
                f"{self.latent_channels} channels"
            )

    def unscaled(self, latents: Array) -> Array:
        """Latents as the denoiser has them -> as the autoencoder has them: latents * std / scaling_factor + mean"""
        if self.latents_mean is None:
            return latents / self.scaling_factor
        std, mean = (jnp.array(values, latents.dtype) for values in (self.latents_std, self.latents_mean))
        return latents * std / self.scaling_factor + mean

    def scaled(self, latents: Array) -> Array:
        """The inverse of `unscaled`: (latents - mean) * scaling_factor / std"""
        if self.latents_mean is None:
            return latents * self.scaling_factor
        std, mean = (jnp.array(values, latents.dtype) for values in (self.latents_std, self.latents_mean))
        return (latents - mean) * self.scaling_factor / std

    @property
    def factor(self) -> int:
        """Pixels of a picture per pixel of its latents, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def last_channels(self) -> int:
        """Of the decoder's last level, which has the size of the picture."""
        return self.block_out_channels[0]

    def compute_dtype(self, dtype: DTypeLike) -> DTypeLike:
        """float32 for float16 with `force_upcast`: activations of SD 1's and SDXL's autoencoders overflow it."""
        return jnp.float32 if self.force_upcast and jnp.dtype(dtype) == jnp.float16 else dtype


@dataclass(frozen=True)
class DiagonalGaussian:
    """N(mean, exp(logvar)), independent in every element; logvar is clipped to [-30, 20]."""

    mean: Array
    logvar: Array

    def mode(self) -> Array:
        """The mean."""
        return self.mean

    def sample(self, noise: Array) -> Array:
        """mean + exp(logvar / 2) * noise, which is standard normal"""
        return self.mean + jnp.exp(self.logvar / 2) * noise.astype(self.mean.dtype)


class Block(nnx.Module):
    """Residual blocks, then a change of size if there is one: a level of the encoder or of the decoder."""

    def __init__(self, cin: int, cout: int, layers: int, *, resize: str | None, groups: int, **kw: Unpack[LayerArgs]):
        self.resnets = nnx.List(
            ResnetBlock(cin if i == 0 else cout, cout, None, groups=groups, eps=EPS, **kw) for i in range(layers)
        )
        if resize == "down":
            self.downsamplers = nnx.List([Downsample(cout, ((0, 1), (0, 1)), **kw)])
        elif resize == "up":
            self.upsamplers = nnx.List([Upsample(cout, **kw)])

    def __call__(self, x: Array) -> Array:
        for layer in (*self.resnets, *getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())):
            x = layer(x)
        return x


class MidBlock(nnx.Module):
    """resnet, attention over all pixels, resnet"""

    def __init__(self, channels: int, *, add_attention: bool, groups: int, **kw: Unpack[LayerArgs]):
        self.resnets = nnx.List(ResnetBlock(channels, channels, None, groups=groups, eps=EPS, **kw) for _ in range(2))
        self.attentions = nnx.List(
            [SpatialAttention(channels, heads=1, groups=groups, eps=EPS, **kw)] if add_attention else []
        )

    def __call__(self, x: Array) -> Array:
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = layer(x)
        return x


def levels(widths: tuple[int, ...], resize: str) -> list[tuple[int, int, str | None]]:
    """(channels in, channels out, resize) of each level: every level but the last changes the size."""
    resizes = [resize] * (len(widths) - 1) + [None]
    return list(zip((widths[0], *widths[:-1]), widths, resizes, strict=True))


class Encoder(nnx.Module):
    """[B H W 3] -> [B H/f W/f 2C], mean and logvar side by side"""

    def __init__(self, config: AutoencoderKLConfig, **kw: Unpack[LayerArgs]):
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = conv(config.in_channels, widths[0], 3, **kw)
        self.down_blocks = nnx.List(
            Block(cin, cout, config.layers_per_block, resize=resize, groups=groups, **kw)
            for cin, cout, resize in levels(widths, "down")
        )
        self.mid_block = MidBlock(widths[-1], add_attention=config.mid_block_add_attention, groups=groups, **kw)
        self.conv_norm_out = GroupNorm(widths[-1], groups=groups, eps=EPS, **kw)
        self.conv_out = conv(widths[-1], 2 * config.latent_channels, 3, **kw)

    def __call__(self, x: Array) -> Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """[B h w C] -> [B h*f w*f 3]"""

    def __init__(self, config: AutoencoderKLConfig, **kw: Unpack[LayerArgs]):
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = conv(config.latent_channels, widths[0], 3, **kw)
        self.mid_block = MidBlock(widths[0], add_attention=config.mid_block_add_attention, groups=groups, **kw)
        self.up_blocks = nnx.List(
            Block(cin, cout, config.layers_per_block + 1, resize=resize, groups=groups, **kw)
            for cin, cout, resize in levels(widths, "up")
        )
        self.conv_norm_out = GroupNorm(widths[-1], groups=groups, eps=EPS, **kw)
        self.conv_out = conv(widths[-1], config.out_channels, 3, **kw)

    def __call__(self, z: Array) -> Array:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(silu(self.conv_norm_out(x)))


class AutoencoderKL(Model):
    """Pictures [B H W 3] in [-1, 1] to latents [B H/f W/f C] and back, f = 2^(levels - 1).

    Latents are as the network has them; `config.unscaled` makes them of the denoiser's.
    """

    config_class = AutoencoderKLConfig
    renames = (
        (r"(attentions\.\d+)\.query\.", r"\1.to_q."),
        (r"(attentions\.\d+)\.key\.", r"\1.to_k."),
        (r"(attentions\.\d+)\.value\.", r"\1.to_v."),
        (r"(attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
    )

    def __init__(self, config: AutoencoderKLConfig, **kw: Unpack[LayerArgs]):
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config, **kw)
        self.decoder = Decoder(config, **kw)
        self.quant_conv = conv(2 * channels, 2 * channels, 1, **kw) if config.use_quant_conv else None
        self.post_quant_conv = conv(channels, channels, 1, **kw) if config.use_post_quant_conv else None

    def encode(self, images: Array) -> DiagonalGaussian:
        """q(z | x): images [B H W 3] in [-1, 1] -> mean and logvar, each [B H/f W/f C]"""
        moments = self.encoder(images)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return DiagonalGaussian(mean, jnp.clip(logvar, -30, 20))

    def decode(self, latents: Array) -> Array:
        """p(x | z): latents [B h w C] -> images [B h*f w*f 3], about [-1, 1]"""
        return self.decoder(latents if self.post_quant_conv is None else self.post_quant_conv(latents))


jax.tree_util.register_dataclass(DiagonalGaussian, [f.name for f in dataclasses.fields(DiagonalGaussian)], [])
