"""What a picture's file says of how it was made: one form, whoever makes the picture."""

from collections.abc import Mapping
from typing import Any

from sdjax.request import Request
from sdjax.sampling import name_of


def picture_settings(request: Request, model: Mapping[str, Any], scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a picture, for `sdjax.pictures.images.encode`: the request's, and what the model was.

    scheduler: the configuration of the sampler, which is written beside its name.
    """
    name = request.scheduler if isinstance(request.scheduler, str) else name_of(scheduler) or scheduler["_class_name"]
    own = request.settings() | {"sampler": name, "scheduler": dict(scheduler)}
    return own | {key: value for key, value in model.items() if value not in (None, {}) or key in LEFT_OUT}


LEFT_OUT = ("vae", "safety_checker")
"""Components: None says that the model's own was left out"""
