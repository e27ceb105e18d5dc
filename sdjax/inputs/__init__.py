"""From requests to the arrays that the compiled programs take."""

from sdjax.inputs.arrays import Inputs, prepare
from sdjax.inputs.batches import shared
from sdjax.inputs.branches import reading, time_ids
from sdjax.inputs.checks import CHECKS
from sdjax.inputs.control import by_image
from sdjax.inputs.given import NOTHING, Given
from sdjax.inputs.guidance import guidance_of, guidance_scale
from sdjax.inputs.hires import second_pass
from sdjax.inputs.ip_adapter import image_embeds, prompts_by_image
from sdjax.inputs.sizes import (
    DEFAULT_SIZE,
    check_fits,
    latent_shape,
    latent_size,
    picture_size,
    request_size,
)
from sdjax.inputs.tables import scheduler_of, strength_of, table_of
from sdjax.inputs.tasks import has_size_of_picture, takes_pictures

__all__ = [
    "CHECKS",
    "DEFAULT_SIZE",
    "NOTHING",
    "Given",
    "Inputs",
    "by_image",
    "check_fits",
    "guidance_of",
    "guidance_scale",
    "has_size_of_picture",
    "image_embeds",
    "latent_shape",
    "latent_size",
    "picture_size",
    "prepare",
    "prompts_by_image",
    "reading",
    "request_size",
    "scheduler_of",
    "second_pass",
    "shared",
    "strength_of",
    "table_of",
    "takes_pictures",
    "time_ids",
]
