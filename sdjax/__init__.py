"""Stable Diffusion in JAX and Flax for TPUs, GPUs and CPUs."""

from importlib.metadata import version

from sdjax import compile_cache, denoise, parallel, samplers
from sdjax.checkpoints.errors import CheckpointError
from sdjax.images import image_grid
from sdjax.models import AutoencoderKL, CLIPTextModel, UNet2DConditionModel
from sdjax.pipeline import StableDiffusionPipeline, StableDiffusionPipelineOutput
from sdjax.tokenizer import CLIPTokenizer

__version__ = version("sdjax")
__all__ = [
    "AutoencoderKL",
    "CLIPTextModel",
    "CLIPTokenizer",
    "CheckpointError",
    "StableDiffusionPipeline",
    "StableDiffusionPipelineOutput",
    "UNet2DConditionModel",
    "denoise",
    "image_grid",
    "parallel",
    "samplers",
]

compile_cache.enable()
