"""The networks: text and image encoders, UNet, ControlNet, adapters, autoencoders and safety checker, in Flax NNX."""

from sdjax.models.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from sdjax.models.clip import CLIPTextConfig, CLIPTextModel
from sdjax.models.clip_vision import CLIPVisionModelConfig, CLIPVisionModelWithProjection
from sdjax.models.controlnet import ControlNetConfig, ControlNetModel
from sdjax.models.controlnet_union import ControlNetUnionConfig, ControlNetUnionModel
from sdjax.models.image_normalizer import ImageNormalizerConfig, StableUnCLIPImageNormalizer
from sdjax.models.ip_adapter import IPAdapter, IPAdapterConfig
from sdjax.models.latent_upscaler import LatentUpscaler, LatentUpscalerConfig
from sdjax.models.rrdbnet import RRDBNet, RRDBNetConfig
from sdjax.models.safety_checker import StableDiffusionSafetyChecker, StableDiffusionSafetyCheckerConfig
from sdjax.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from sdjax.models.unet import UNet2DConditionConfig, UNet2DConditionModel
from sdjax.models.vae import AutoencoderKL, AutoencoderKLConfig, DiagonalGaussian

__all__ = [
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "AutoencoderTiny",
    "AutoencoderTinyConfig",
    "CLIPTextConfig",
    "CLIPTextModel",
    "CLIPVisionModelConfig",
    "CLIPVisionModelWithProjection",
    "ControlNetConfig",
    "ControlNetModel",
    "ControlNetUnionConfig",
    "ControlNetUnionModel",
    "DiagonalGaussian",
    "IPAdapter",
    "IPAdapterConfig",
    "ImageNormalizerConfig",
    "LatentUpscaler",
    "LatentUpscalerConfig",
    "RRDBNet",
    "RRDBNetConfig",
    "StableDiffusionSafetyChecker",
    "StableDiffusionSafetyCheckerConfig",
    "StableUnCLIPImageNormalizer",
    "T2IAdapter",
    "T2IAdapterConfig",
    "UNet2DConditionConfig",
    "UNet2DConditionModel",
]
