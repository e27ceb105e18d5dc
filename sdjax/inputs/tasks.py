"""What a UNet is for, which the number of channels that it takes beside the latents says."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdjax.diffusion_pipeline import DiffusionPipeline

GENERATE, INPAINT, EDIT, DEPTH = "generate", "inpaint", "edit", "depth"
"""Nothing beside the latents; a mask and the latents of what it leaves; the latents of a picture (InstructPix2Pix,
arXiv:2211.09800); how near what it shows is (SD 2 depth)"""


def task(pipe: "DiffusionPipeline") -> str:
    """GENERATE, INPAINT, EDIT or DEPTH. Raises ValueError for another number of channels."""
    channels, taken = pipe.vae.config.latent_channels, pipe.unet.config.in_channels
    found = {channels: GENERATE, 2 * channels + 1: INPAINT, 2 * channels: EDIT, channels + 1: DEPTH}.get(taken)
    if found is None:
        raise ValueError(
            f"this UNet takes {taken} channels where the VAE's latents have {channels}: it is for a task that is not "
            "supported"
        )
    return found


def takes_pictures(pipe: "DiffusionPipeline") -> bool:
    """Whether nothing is made without a picture: for its UNet's task, or for a ControlNet or T2I-Adapter."""
    return bool(pipe.controls) or task(pipe) != GENERATE
