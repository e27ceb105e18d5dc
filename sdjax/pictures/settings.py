"""What a picture's file says of how it was made: one form, whoever makes the picture."""

from collections.abc import Mapping
from typing import Any

UNSAID = {
    "timestep_spacing": (None,),
    "variant": (None,),
    "revision": (None,),
    "prediction_type": (None,),
    "loras": ({},),
    "embeddings": ({},),
    "clip_skip": (None, 0),
    "noise": ("jax",),
    "guidance_interval": (None,),
    "cache_interval": (None,),
    "vae_tiling": (False,),
}
"""Settings and their values that are left out: pictures are so where nobody asks for anything else"""


def picture_settings(said: Mapping[str, Any], scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a picture, for `sdjax.pictures.images.encode`.

    said: what was asked for, as `sdjax.batch.job.Item.settings` gives it, and what is known of the model, by name.
    scheduler: the configuration of the sampler, which is written beside what `said` calls it (None: its class).
    """
    named = {"sampler": said["scheduler"] or scheduler["_class_name"], "scheduler": dict(scheduler)}
    return {name: value for name, value in ({**said} | named).items() if value not in UNSAID.get(name, ())}
