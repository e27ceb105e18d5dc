"""Stable Diffusion in JAX and Flax for TPUs, GPUs and CPUs."""

from importlib import import_module
from typing import Any

from sdjax.lazy import attribute

MODULES = {
    "sdjax.checkpoints.errors": ["CheckpointError"],
    "sdjax.pictures.finite": ["NotFiniteWarning"],
    "sdjax.pictures.grids": ["image_grid"],
    "sdjax.models": ["AutoencoderKL", "CLIPTextModel", "ControlNetModel", "UNet2DConditionModel"],
    "sdjax.diffusion_pipeline": ["EMBEDDED_MODEL"],
    "sdjax.pipeline": ["StableDiffusionPipeline", "StableDiffusionPipelineOutput"],
    "sdjax.text.tokenizer": ["CLIPTokenizer"],
}
HOME = {name: module for module, names in MODULES.items() for name in names}
SUBMODULES = ("batch", "models", "notebooks", "pictures", "runtime", "sampling")

__all__ = [*HOME, *SUBMODULES]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for, so that `sdjax --help` does without JAX."""
    if name == "__version__":
        from importlib.metadata import version

        return version("sdjax")
    if name in __all__:
        from sdjax.runtime.requirements import outdated

        if message := outdated():
            raise ImportError(message)
    if name in SUBMODULES:
        return import_module(f"sdjax.{name}")
    if name not in HOME:
        from sdjax.request.elsewhere import hint

        raise AttributeError(f"module 'sdjax' has no attribute {name!r}{hint(name, __all__)}")
    return attribute(__name__, HOME, name)
