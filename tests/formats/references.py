"""PyTorch's pipelines and their pictures, and ours of the same weights."""

from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import jax
import numpy as np
import oracle
from saved_formats import networks

import sdjax
from sdjax.runtime import parallel

FAMILIES = {
    "sd1": oracle.SD1,
    "sd2": oracle.SD2,
    "sdxl": oracle.SDXL,
    "refiner": oracle.REFINER,
    "lcm": oracle.LCM,
}
LATENTS = oracle.normal(1, 8, 8, 4)
TOLERANCE = 1e-4
UNET_FILE, VAE_FILE = (f"{name}/diffusion_pytorch_model.safetensors" for name in ("unet", "vae"))


class Reference(NamedTuple):
    """A pipeline of PyTorch, how it is called, and its picture."""

    pipe: diffusers.DiffusionPipeline
    call: dict[str, Any]
    picture: np.ndarray


def arguments(kind: str, factor: int) -> dict[str, Any]:
    call = {"prompt": "a blue goose", "num_inference_steps": 2, "output_type": "np"}
    if kind == "refiner":
        return {**call, "num_inference_steps": 4, "denoising_start": 0.5, "image": LATENTS}
    sizes = {"height": 8 * factor, "width": 8 * factor, "latents": LATENTS}
    return (
        call
        | sizes
        | ({"num_inference_steps": 1, "guidance_scale": 8.5} if kind == "lcm" else {"negative_prompt": "goose"})
    )


def their_picture(pipe: diffusers.DiffusionPipeline, call: dict[str, Any]) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    tensors = {name: oracle.nchw(value) for name, value in call.items() if name in ("latents", "image")}
    return pipe(**{**call, **tensors}).images


def load(source: Any, **kw: Any) -> sdjax.StableDiffusionPipeline:
    return sdjax.StableDiffusionPipeline.from_pretrained(source, mesh=parallel.data_mesh(jax.devices()[:1]), **kw)


def load_file_of(path: Path, **kw: Any) -> sdjax.StableDiffusionPipeline:
    return sdjax.StableDiffusionPipeline.from_single_file(path, mesh=parallel.data_mesh(jax.devices()[:1]), **kw)


def assert_pictures(pipe: sdjax.StableDiffusionPipeline, reference: Reference, tolerance: float = TOLERANCE) -> None:
    oracle.assert_close(pipe(**reference.call).images, reference.picture, tolerance)
    assert np.std(reference.picture) > 0.05


def refer(pipe: diffusers.DiffusionPipeline, kind: str) -> Reference:
    """Every weight becomes one that float16 and bfloat16 have, so that all formats hold the same."""
    for module in networks(pipe).values():
        module.bfloat16().half().float()
    call = arguments(kind, pipe.vae_scale_factor)
    return Reference(pipe, call, their_picture(pipe, call))


def with_component(reference: Reference, **components: Any) -> Reference:
    pipe = type(reference.pipe)(**{**reference.pipe.components, **components}, **requirements(reference.pipe))
    return reference._replace(pipe=pipe, picture=their_picture(pipe, reference.call))


def requirements(pipe: diffusers.DiffusionPipeline) -> dict[str, Any]:
    return {"requires_safety_checker": False} if "safety_checker" in pipe.components else {}
