"""What PyTorch's pipelines of Stable Diffusion 1 and 2 correct in configs of the first versions of diffusers."""

import re
from collections.abc import Mapping
from typing import Any

from sdjax.fields import brief

UNCLIPPED = {"steps_offset": 1, "clip_sample": False}
WITH_PLMS = {"steps_offset": 1, "skip_prk_steps": True}
SCHEDULERS: Mapping[str, Mapping[str, Any]] = {
    "StableDiffusionPipeline": UNCLIPPED,
    "StableDiffusionImg2ImgPipeline": UNCLIPPED,
    "StableDiffusionInpaintPipeline": WITH_PLMS,
    "StableDiffusionPAGPipeline": UNCLIPPED,
    "StableDiffusionPAGImg2ImgPipeline": UNCLIPPED,
    "StableDiffusionPAGInpaintPipeline": UNCLIPPED,
    "StableDiffusionInpaintPipelineLegacy": UNCLIPPED,
    "StableDiffusionDiffEditPipeline": WITH_PLMS,
    "CycleDiffusionPipeline": UNCLIPPED,
    "LEditsPPPipelineStableDiffusion": UNCLIPPED,
}
"""By pipeline: the options of a scheduler, and the values that replace all others. Other pipelines correct nothing."""

SAMPLE_SIZE = 64
UPSCALER_FACTOR = 0.08333
BEFORE_0_9 = re.compile(r"0\.[0-8](?!\d)")


def scheduler(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The corrections of a scheduler's config, in which the defaults of its class are filled in."""
    options = SCHEDULERS.get(kind, {})
    return {key: right for key, right in options.items() if key in config and (config[key] or False) != right}


def unet(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The corrections of a UNet's config.json: written before diffusers 0.9, a smaller sample_size is 64."""
    size, version = config.get("sample_size"), brief(config.get("_diffusers_version")).strip("'")
    wrong = kind in SCHEDULERS and BEFORE_0_9.match(version) and isinstance(size, int) and size < SAMPLE_SIZE
    return {"sample_size": SAMPLE_SIZE} if wrong else {}


def vae(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The corrections of a VAE's config.json: the x4 upscaler has one scaling_factor, whatever is there."""
    wrong = kind == "StableDiffusionUpscalePipeline" and config.get("scaling_factor") != UPSCALER_FACTOR
    return {"scaling_factor": UPSCALER_FACTOR} if wrong else {}


def changes(config: Mapping[str, Any], corrections: Mapping[str, Any]) -> list[str]:
    """For people: 'steps_offset 1 instead of 0', …"""
    return [f"{key} {right} instead of {brief(config.get(key))}" for key, right in corrections.items()]
