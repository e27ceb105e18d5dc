"""Arrays that a call gives beside its requests."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sdjax.text.encoding import Embeddings


class Given(NamedTuple):
    """Arrays in place of what requests say, and the part of the noise that is removed."""

    latents: Any = None
    """[B h w C] the initial standard normal noise"""
    image: Any = None
    """[B h w C] the latents of the pictures to start from, in place of the requests'"""
    first: Any = None
    """[B h w C] the latents of a first pass to go on from, on the devices, padded"""
    denoising_start: float = 0.0
    denoising_end: float = 1.0
    embeddings: Mapping[str, Embeddings] = {}
    """by the prefix of their branch"""
    image_embeds: Sequence[Any] | None = None
    """for each IP-Adapter, see `inputs.ip_adapter.embeds_of`"""


NOTHING = Given()
