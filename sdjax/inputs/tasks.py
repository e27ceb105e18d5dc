"""What a UNet is for, which the channels that it takes beside the latents say, and the classes that it takes."""

from typing import TYPE_CHECKING

from sdjax.models.latent_upscaler import POOLED

if TYPE_CHECKING:
    from sdjax.diffusion_pipeline import DiffusionPipeline

GENERATE, INPAINT, EDIT, DEPTH = "generate", "inpaint", "edit", "depth"
"""Nothing beside the latents; a mask and the latents of what it leaves; the latents of a picture (InstructPix2Pix,
arXiv:2211.09800); how near what it shows is (SD 2 depth)"""
UPSCALE, ENLARGE, VARY = "upscale", "enlarge", "vary"
"""The colours of a picture that is made larger, with noise (the x4 upscaler); its latents, twice as large (the x2
latent upscaler); nothing, and the embedding of a picture in place of a class (Stable unCLIP)"""

LARGER = (UPSCALE, ENLARGE)
FROM_NOISE = (EDIT, *LARGER, VARY)
"""Those that see a picture and yet start from noise alone"""
COLOURS = 3


def task(pipe: "DiffusionPipeline") -> str:
    """One of these. Raises ValueError for another number of channels, or classes, which no task here has."""
    unet, channels = pipe.unet.config, pipe.vae.config.latent_channels
    beside = {COLOURS: UPSCALE, 0: GENERATE, channels + 1: INPAINT, channels: EDIT, 1: DEPTH}
    if is_enlarging := unet.addition_embed_type == POOLED:
        beside = {channels: ENLARGE}
    found = beside.get(unet.in_channels - channels)
    if found is None:
        raise ValueError(
            f"this UNet takes {unet.in_channels} channels where the VAE's latents have {channels}: it is for a task "
            "that is not supported"
        )
    if is_enlarging:
        return found
    if found == GENERATE and unet.takes_vector:
        return VARY
    if unet.takes_vector or (unet.takes_number and found != UPSCALE):
        raise ValueError("this UNet is conditioned on classes: it is for a task that is not supported")
    return found


def has_size_of_picture(pipe: "DiffusionPipeline") -> bool:
    """Whether what is made of a picture has by default its size, or a multiple of it."""
    return task(pipe) != VARY


def takes_pictures(pipe: "DiffusionPipeline") -> bool:
    """Whether nothing is made without a picture: for its UNet's task, or for a ControlNet or T2I-Adapter."""
    return bool(pipe.controls) or task(pipe) != GENERATE
