"""What is changed inside the UNet, of requests: layers that are perturbed, features that are weighed."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sdjax.inputs.batches import shared
from sdjax.inputs.tasks import ENLARGE, task
from sdjax.request import FIELDS, Request
from sdjax.text.conditioning import Condition

if TYPE_CHECKING:
    from sdjax.diffusion_pipeline import DiffusionPipeline


OF_LAYERS = ("pag_scale", "freeu", "cache_interval")


def check_layers(pipe: "DiffusionPipeline", request: Request) -> None:
    """Raises ValueError for layers that are not there or not used, and for a FreeU of other than four numbers."""
    perturbed_layers(pipe, [request])
    freed([request])


def perturbed_layers(pipe: "DiffusionPipeline", requests: Sequence[Request]) -> list[str]:
    """The transformer blocks with self-attention whose names have one of `pag_applied_layers` in them; none without a
    pag_scale.

    Raises ValueError for a part of no name, for parts without a pag_scale, and for what the UNet has no layers for.
    """
    for request in requests:
        if task(pipe) == ENLARGE and (name := next((n for n in OF_LAYERS if getattr(request, n)), None)):
            raise ValueError(f"{name}: not with the x2 latent upscaler")
        if not request.pag_scale and request.pag_applied_layers != FIELDS["pag_applied_layers"].default:
            raise ValueError("pag_applied_layers: only with pag_scale")
    if not any(request.pag_scale for request in requests):
        return []
    blocks = pipe.unet.transformer_blocks()
    names, found = [name for name, block in blocks.items() if not block.only_cross_attention], set()
    for part in shared(requests, "pag_applied_layers"):
        matching = {name for name in names if re.search(rf"(?<![^._]){re.escape(part)}(?!\d)", name)}
        if not matching:
            raise ValueError(f"pag_applied_layers: {part!r} is in the name of no layer; there are {', '.join(names)}")
        found |= matching
    return [name for name in names if name in found]


def freed(requests: Sequence[Request]) -> Condition:
    """{"freeu": [B 4]} where there is a FreeU. Raises ValueError for other than four numbers, or none in some."""
    values = [request.freeu for request in requests]
    if not any(values):
        return {}
    if any(value is not None and len(value) != 4 for value in values):
        raise ValueError("freeu must be four numbers, s1,s2,b1,b2")
    return {"freeu": np.float32([value or (1, 1, 1, 1) for value in values])}
