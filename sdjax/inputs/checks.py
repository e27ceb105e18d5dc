"""What is wrong with a request by itself: for a batch before it starts, and for all lines of a job."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sdjax.inputs.branches import SECOND, check_sizes, reading
from sdjax.inputs.control import BY_PICTURE, check_control
from sdjax.inputs.guidance import check_guidance
from sdjax.inputs.hires import HIRES, check_hires
from sdjax.inputs.ip_adapter import check_ip_adapter
from sdjax.inputs.layers import check_layers
from sdjax.inputs.noise_level import check_noise_level
from sdjax.inputs.sizes import latent_shape, request_size
from sdjax.inputs.sources import check_sources
from sdjax.inputs.tables import table_of
from sdjax.request import Request, TableKey
from sdjax.text import conditioning

if TYPE_CHECKING:
    from sdjax.diffusion_pipeline import DiffusionPipeline

MASK = ("image", "mask_image", "outpaint", "soft_mask", "mask_blur", "padding_mask_crop")
SIZE = ("height", "width")
TEXTS = ("prompt", "prompt_syntax")
LIMITS = ("mimic_scale", "threshold_percentile")
GUIDANCE = ("guidance_scale", "guidance_interval", "image_guidance_scale", "cfg_plus_plus", "perp_neg_scale", *LIMITS)

Check = Callable[["DiffusionPipeline", Request], Any]
"""Raises ValueError that names the field"""

CHECKS: tuple[tuple[Check, tuple[str, ...]], ...] = (
    (lambda pipe, request: table_of(pipe, request.table_key), (*TableKey._fields[:-2], *MASK)),
    (check_control, (*BY_PICTURE, "guess_mode", *MASK)),
    (check_ip_adapter, ("ip_adapter_image", "ip_adapter_mask", "ip_adapter_scale", "padding_mask_crop")),
    (lambda pipe, request: latent_shape(pipe, *request_size(pipe, request)), (*SIZE, "control_image", *MASK)),
    (lambda pipe, request: reading(pipe, request.clip_skip), ("clip_skip",)),
    (check_sources, ("depth_map", *MASK)),
    (check_noise_level, ("noise_level",)),
    (check_guidance, (*TEXTS, *GUIDANCE)),
    (check_sizes, (*conditioning.SIZE_FIELDS, *SECOND)),
    (check_layers, ("pag_scale", "pag_applied_layers", "freeu", "cache_interval")),
    (check_hires, (*HIRES, "num_inference_steps", "scheduler", *SIZE, *MASK)),
)
"""Each with the fields that it looks at"""
