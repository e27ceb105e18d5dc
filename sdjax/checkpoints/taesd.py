"""TAESD's own files (github.com/madebyollin/taesd): the encoder and the decoder, each a plain nn.Sequential."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sdjax.checkpoints import weights
from sdjax.checkpoints.errors import CheckpointError

Tensors = Mapping[str, np.ndarray]
LAYER = re.compile(r"(\d+)\.((?:conv\.\d+\.)?(?:weight|bias))")
FIRST = {"encoder": 0, "decoder": 1}
"""The number of the first convolution: in the decoder a bound of the latents goes before it"""
BLOCK = {"encoder": "1.conv.0.weight", "decoder": "3.conv.0.weight"}
"""A tensor of the first residual block, in which the halves differ"""
OTHER = {"encoder": "decoder", "decoder": "encoder"}


def joined(path: Path, tensors: Tensors) -> Tensors:
    """The tensors of one of these files, and of the other half beside it, under the names of AutoencoderTiny.

    The other half is the file whose name has "encoder" where this one's has "decoder". A decoder may be alone. Other
    tensors are returned as they are. Raises CheckpointError for an encoder without its decoder.
    """
    half = _half(tensors)
    if half is None:
        return tensors
    halves = {half: tensors}
    if (beside := path.with_name(path.name.replace(half, OTHER[half]))) != path and beside.is_file():
        others = weights.open_tensors(beside)
        if _half(others) != OTHER[half]:
            raise CheckpointError(f"{beside}: is not the {OTHER[half]} of {path.name}")
        halves[OTHER[half]] = others
    elif half == "encoder":
        raise CheckpointError(
            f"{path}: TAESD's encoder alone, which cannot decode; give the decoder, such as taesd_decoder.pth"
        )
    return {
        f"{half}.layers.{int(match[1]) - FIRST[half]}.{match[2]}": array
        for half, own in halves.items()
        for name, array in own.items()
        if (match := LAYER.fullmatch(name))
    }


def _half(tensors: Tensors) -> str | None:
    if not all(map(LAYER.fullmatch, tensors)):
        return None
    return next((half for half, n in FIRST.items() if f"{n}.weight" in tensors and BLOCK[half] in tensors), None)
