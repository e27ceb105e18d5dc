"""T2I-Adapter (arXiv:2302.08453): a small network that sees a picture, and adds to a UNet's levels on the way down."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sdjax.checkpoints.errors import CheckpointError
from sdjax.fields import Levels, Within
from sdjax.models.base import Model, ModelConfig
from sdjax.models.layers import LayerArgs, conv, side_by_side

FULL, XL, LIGHT = "full_adapter", "full_adapter_xl", "light_adapter"
NARROWED = 4  # times, inside a block of a light adapter
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in grey (ITU-R BT.601)

Width = Annotated[int, Within(NARROWED, 2**16)]


@dataclass(frozen=True)
class T2IAdapterConfig(ModelConfig):
    """The fields of a diffusers `adapter/config.json`, with its defaults.

    `in_channels` 1: of the grey picture. `downscale_factor`: pixels on a side that become channels of one.
    """

    in_channels: int = 3
    channels: Annotated[tuple[Width, ...], Levels] = (320, 640, 1280, 1280)
    num_res_blocks: Annotated[int, Within(1, 64)] = 2
    downscale_factor: Annotated[int, Within(1, 64)] = 8
    adapter_type: str = FULL

    neutral: ClassVar = {"in_channels": {1, 3}, "adapter_type": {FULL, XL, LIGHT}}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter_type == XL and len({*self.channels[2:]}) > 1:
            raise CheckpointError(f"{type(self).__name__}: {XL} with channels {self.channels}: the last ones differ")

    def blocks(self) -> Iterator[tuple[int, int, bool]]:
        """(channels in, channels out, whether it halves the sides) of each block."""
        is_light, is_xl = self.adapter_type == LIGHT, self.adapter_type == XL
        widths = (self.channels[0], *self.channels)
        if is_light:
            widths = (self.in_channels * self.downscale_factor**2, *self.channels, self.channels[-1])
        for i, (cin, cout) in enumerate(itertools.pairwise(widths)):
            yield cin, cout, i == 2 if is_xl else i > 0

    @property
    def features(self) -> tuple[tuple[int, int], ...]:
        """(channels, pixels of the picture on a side for each of its own) of what each block gives."""
        found, factor = [], self.downscale_factor
        for _, cout, is_halved in self.blocks():
            factor *= 2 if is_halved else 1
            found.append((cout, factor))
        return tuple(found)


class AdapterResnetBlock(nnx.Module):
    """x + block2(relu(block1(x))): [B H W C] -> [B H W C]"""

    def __init__(self, width: int, size: int, **kw: Unpack[LayerArgs]):
        """size: of the second convolution."""
        self.block1 = conv(width, width, 3, **kw)
        self.block2 = conv(width, width, size, **kw)

    def __call__(self, x: Array) -> Array:
        return x + self.block2(jax.nn.relu(self.block1(x)))


class AdapterBlock(nnx.Module):
    """out_conv(resnets(in_conv(x))): [B H W cin] -> [B H W cout], or its sides halved first

    A light one computes in a fourth of the channels; another has no out_conv, and an in_conv where channels change.
    """

    def __init__(self, cin: int, cout: int, *, is_halved: bool, is_light: bool, resnets: int, **kw: Unpack[LayerArgs]):
        width = cout // NARROWED if is_light else cout
        self.is_halved = is_halved
        self.in_conv = conv(cin, width, 1, **kw) if is_light or cin != cout else None
        self.resnets = nnx.List(AdapterResnetBlock(width, 3 if is_light else 1, **kw) for _ in range(resnets))
        self.out_conv = conv(width, cout, 1, **kw) if is_light else None

    def __call__(self, x: Array) -> Array:
        if self.is_halved:
            x = _halved(x)
        for layer in (self.in_conv, *self.resnets, self.out_conv):
            x = x if layer is None else layer(x)
        return x


class AdapterBody(nnx.Module):
    """[B H W C] in 0..1 -> what each block gives, one after the other: its pixels side by side, then a convolution."""

    def __init__(self, config: T2IAdapterConfig, **kw: Unpack[LayerArgs]):
        is_light, self.factor = config.adapter_type == LIGHT, config.downscale_factor
        pixels = config.in_channels * self.factor**2
        self.conv_in = None if is_light else conv(pixels, config.channels[0], 3, **kw)
        self.body = nnx.List(
            AdapterBlock(cin, cout, is_halved=is_halved, is_light=is_light, resnets=config.num_res_blocks, **kw)
            for cin, cout, is_halved in config.blocks()
        )

    def __call__(self, x: Array) -> list[Array]:
        x = side_by_side(x, self.factor)
        x = x if self.conv_in is None else self.conv_in(x)
        features = []
        for block in self.body:
            features.append(x := block(x))
        return features


class T2IAdapter(Model):
    """A picture [B H W 3] in 0..1 -> the `features` of `UNet2DConditionModel`: [B h w C] for each level

    With SDXL's, one more for the middle. Sides are multiples of `downscale_factor`.
    """

    config_class = T2IAdapterConfig

    def __init__(self, config: T2IAdapterConfig, **kw: Unpack[LayerArgs]):
        self.config = config
        self.adapter = AdapterBody(config, **kw)

    def embed_picture(self, picture: Array) -> list[Array]:
        """The features. They depend on nothing else."""
        if self.config.in_channels == 1:
            picture = sum(share * picture[..., i : i + 1] for i, share in enumerate(LUMA))
        return self.adapter(picture)


def _halved(x: Array) -> Array:
    """The means of 2x2 pixels, of those that there are at an odd edge: [B H W C] -> [B ceil(H/2) ceil(W/2) C]"""
    B, H, W, C = x.shape
    x = jnp.pad(x, ((0, 0), (0, H % 2), (0, W % 2), (0, 0)), mode="edge")
    return x.reshape(B, (H + 1) // 2, 2, (W + 1) // 2, 2, C).mean(axis=(2, 4))
