"""The networks: text encoder, UNet and autoencoder, in Flax NNX."""

from sdjax.models.clip import CLIPTextConfig, CLIPTextModel
from sdjax.models.unet import UNet2DConditionConfig, UNet2DConditionModel
from sdjax.models.vae import AutoencoderKL, AutoencoderKLConfig, DiagonalGaussian

__all__ = [
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "CLIPTextConfig",
    "CLIPTextModel",
    "DiagonalGaussian",
    "UNet2DConditionConfig",
    "UNet2DConditionModel",
]
