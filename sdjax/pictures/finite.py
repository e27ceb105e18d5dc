"""Pictures with values that are not finite: the warning about them, and what is shown in their place."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

ADVICE = "a computation overflowed; try dtype bfloat16 or float32, a VAE of float32, or smaller weights of LoRAs"
VAE_OVERFLOW = "the VAE overflowed in float16: pictures are decoded again in float32; a VAE of float32 spares the time"
SEEDS_SHOWN = 8


class NotFiniteWarning(UserWarning):
    """Pictures have values that are not finite."""


def message(not_finite: Sequence[bool], seeds: Sequence[int]) -> str:
    """How many pictures are not finite, of which seeds, and what to try."""
    found = [str(seed) for seed, is_wrong in zip(seeds, not_finite, strict=True) if is_wrong]
    shown = ", ".join(found[:SEEDS_SHOWN]) + (", …" if len(found) > SEEDS_SHOWN else "")
    return f"{len(found)} of {len(seeds)} pictures not finite (seed {shown}): {ADVICE}"


def reported(not_finite: Any, seeds: Sequence[int]) -> list[bool]:
    """The flags, [B or more], of the pictures of these seeds, with a warning where any is set."""
    flags = np.asarray(not_finite)[: len(seeds)].tolist()
    if any(flags):
        warnings.warn(message(flags, seeds), NotFiniteWarning, stacklevel=4)
    return flags


def blackened(pictures: np.ndarray, not_finite: Sequence[bool]) -> np.ndarray:
    """Pictures [B H W 3] in -1..1, black where they are not finite."""
    return np.where(np.reshape(not_finite, (-1, 1, 1, 1)), np.float32(-1), pictures) if any(not_finite) else pictures
