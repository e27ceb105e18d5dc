"""The networks: text encoder, UNet, ControlNet, autoencoders and safety checker, in Flax NNX."""

from sdjax.models.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from sdjax.models.clip import CLIPTextConfig, CLIPTextModel
from sdjax.models.controlnet import ControlNetConfig, ControlNetModel
from sdjax.models.rrdbnet import RRDBNet, RRDBNetConfig
from sdjax.models.safety_checker import StableDiffusionSafetyChecker, StableDiffusionSafetyCheckerConfig
from sdjax.models.unet import UNet2DConditionConfig, UNet2DConditionModel
from sdjax.models.vae import AutoencoderKL, AutoencoderKLConfig, DiagonalGaussian

__all__ = [
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "AutoencoderTiny",
    "AutoencoderTinyConfig",
    "CLIPTextConfig",
    "CLIPTextModel",
    "ControlNetConfig",
    "ControlNetModel",
    "DiagonalGaussian",
    "RRDBNet",
    "RRDBNetConfig",
    "StableDiffusionSafetyChecker",
    "StableDiffusionSafetyCheckerConfig",
    "UNet2DConditionConfig",
    "UNet2DConditionModel",
]
