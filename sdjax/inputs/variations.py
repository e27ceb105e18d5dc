"""The pictures that unCLIP varies, as vectors that a UNet is conditioned on."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jax import Array

from sdjax.inputs.guidance import Guidance
from sdjax.inputs.noise_level import noise_amounts, noise_levels
from sdjax.inputs.sources import VARYING
from sdjax.inputs.tasks import VARY, task
from sdjax.request import Request
from sdjax.runtime import programs
from sdjax.sampling.noise import SHOWN
from sdjax.text.conditioning import Condition

if TYPE_CHECKING:
    from sdjax.diffusion_pipeline import DiffusionPipeline


def with_varied_pictures(
    pipe: "DiffusionPipeline",
    requests: Sequence[Request],
    shown: np.ndarray | None,
    guidance: Guidance,
    branches: tuple[Condition, ...],
    noise: Mapping[int, Array],
) -> tuple[Condition, ...]:
    """The branches of the guidance, with the pictures' noised embeddings as `class_labels`; zeros beside a negative
    prompt. shown [B S S 3]: the pictures as CLIP sees them."""
    if task(pipe) != VARY:
        return branches
    graphs, params = zip(*map(pipe.network, VARYING), strict=True)
    levels = pipe.padded(noise_levels(pipe, requests))
    amounts = (*noise_amounts(pipe, requests), levels)
    vectors = programs.embed_pictures(pipe.mesh, graphs, list(params), pipe.padded(shown), noise[SHOWN], amounts)
    nothing = jnp.zeros_like(vectors)
    labels = [nothing if branch.prefix else vectors for branch in guidance.branches]
    return tuple(branch | {"class_labels": own} for branch, own in zip(branches, labels, strict=True))
