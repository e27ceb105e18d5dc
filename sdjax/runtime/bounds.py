"""The least memory that pictures take, against what there is: what cannot fit is refused before XLA is asked.

XLA would compile it for minutes, end the process over numbers past its integers, or have the system end it.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Self

from jax.sharding import Mesh

from sdjax.runtime import host, parallel, programs, tiling
from sdjax.runtime.lowering import DoesNotFit, LoweredProgram
from sdjax.sampling import loop

FLOAT = 4  # bytes
NEAR = 32  # what programs take has been up to so many times the least
HELD = 2  # arrays at the full size that a residual block of any form holds at once: its input, and what is added to it


class Load(NamedTuple):
    """The pictures that a device makes at once."""

    pictures: int
    height: int
    width: int
    tokens: int = 0
    """of a picture's longest text; 0: not known yet"""
    tiled: bool = False

    @classmethod
    def of(cls, mesh: Mesh, pictures: int, height: int, width: int, **rest: Any) -> Self:
        """Of so many pictures, split over the devices."""
        return cls(parallel.padded_size(pictures, mesh.size) // mesh.size, height, width, **rest)

    @property
    def shown(self) -> str:
        size = f"{self.width}x{self.height}"
        return f"a picture of {size}" if self.pictures == 1 else f"a batch of {self.pictures:,} pictures of {size}"


def device_bytes(mesh: Mesh) -> float:
    """What each device of a mesh has; CPU devices have their share of the host's memory."""
    devices = list(mesh.devices.flat)
    if is_host(mesh):
        return host.total() / len(devices)
    return min((device.memory_stats() or {}).get("bytes_limit", math.inf) for device in devices)


def is_host(mesh: Mesh) -> bool:
    """Whether the devices' memory is the host's: where that is not enough, the system ends the process."""
    return mesh.devices.flat[0].platform == "cpu"


def least_bytes(models: Mapping[str, Any], load: Load) -> int:
    """Bytes that any way of making pictures takes on a device at once, beside the parameters: the largest of

    - the texts: the hidden layer of a text encoder's widest block;
    - denoising: what the sampler remembers, and a residual block of the UNet's first level;
    - decoding: latents, pictures, and a residual block of the autoencoder's last level, of what is decoded at a time.
    """
    unet, vae = models["unet"], models["vae"].config
    size = unet.conv_in.kernel.dtype.itemsize
    latents, pixels = load.height * load.width // vae.factor**2, load.height * load.width
    side = tiling.tile_side(vae) * vae.factor if load.tiled else max(load.height, load.width)
    tile = min(load.height, side) * min(load.width, side)
    hidden = max(
        (models[name].config.intermediate_size for name in models if name.startswith("text_encoder")), default=0
    )
    texts = load.pictures * load.tokens * hidden * size
    state = FLOAT * vae.latent_channels * (len(loop.State._fields) - 1 + loop.REMEMBERED)
    denoising = load.pictures * latents * (state + HELD * unet.config.block_out_channels[0] * size)
    pictures = load.pictures * FLOAT * (latents * vae.latent_channels + pixels * vae.out_channels)
    decoding = pictures + programs.decoded_at_once(load.pictures, tile) * tile * HELD * vae.last_channels * size
    return max(texts, denoising, decoding)


def check(models: Mapping[str, Any], mesh: Mesh, load: Load) -> None:
    """Raises DoesNotFit where the devices cannot make these pictures at once."""
    check_against(device_bytes(mesh), models, load)


def check_against(limit: float, models: Mapping[str, Any], load: Load) -> None:
    """Raises DoesNotFit where a device of so many bytes cannot make these pictures at once."""
    if (least := least_bytes(models, load)) > limit:
        raise _refusal(models, load, least, limit)


def is_near(models: Mapping[str, Any], mesh: Mesh, load: Load) -> bool:
    """Whether the system may end the process for want of memory, so that the compiler should be asked."""
    return is_host(mesh) and NEAR * least_bytes(models, load) > device_bytes(mesh)


def check_compiled(models: Mapping[str, Any], mesh: Mesh, load: Load, programs: Iterable[LoweredProgram]) -> None:
    """Raises DoesNotFit where one of these programs takes more than there is, by the compiler's account."""
    limit = device_bytes(mesh)
    for program in programs:
        if (needed := program.peak_bytes()) > limit:
            raise _refusal(models, load, needed, limit)


def _refusal(models: Mapping[str, Any], load: Load, needed: float, limit: float) -> DoesNotFit:
    def fits(**other: Any) -> bool:
        return least_bytes(models, load._replace(**other)) <= limit

    if load.pictures > 1 and fits(pictures=1):
        one = _shown(least_bytes(models, load._replace(pictures=1)))
        advice = f"one at a time takes {one} or more: make fewer at once; `sdjax batch` makes any number"
    elif load.tokens and fits(tokens=0):
        advice = "shorten the prompt"
    elif not load.tiled and fits(tiled=True):
        advice = "make it smaller, or decode it in tiles (vae_tiling)"
    else:
        advice = "make it smaller"
    there = f"there are {_shown(limit)}"
    return DoesNotFit(f"out of memory: {load.shown} takes {_shown(needed)} or more, and {there}; {advice}")


def _shown(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
