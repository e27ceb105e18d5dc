"""Files of textual inversion (arXiv:2208.01618): a token's embedding vectors, as each tool stores them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.checkpoints import hub, pickles, weights
from sdjax.checkpoints.content import format_of, without_ending
from sdjax.checkpoints.errors import CheckpointError
from sdjax.fields import LARGEST

FILE_NAMES = ("learned_embeds.safetensors", "learned_embeds.bin")
"""What the file is called in a folder or a repository"""

ENCODERS = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
}
"""How files for SDXL name the text encoders"""
PLACEHOLDERS = ("", "*")
"""Names without meaning: * is what training tools call any word"""
NAMES_SHOWN = 5
MOST_VECTORS = 1000  # a prompt's chunk has 75 tokens


@dataclass(frozen=True)
class TextualInversion:
    """A token, and the vectors [n D] in float32 that stand for it in each text encoder."""

    token: str | None
    """None: the file has no name for it; so have those that call it * or nothing"""
    vectors: dict[str | None, np.ndarray]
    """By component; the only key is None where the file does not name one: then it is the encoder of width D"""


def read(path: Path) -> TextualInversion:
    """Reads a file of diffusers, of the web UI (also as .pt) or for SDXL's pair of text encoders.

    Raises CheckpointError saying what was found if it is none of these.
    """
    content = pickles.load(path) if format_of(path) == "pickle" else weights.open_tensors(path)
    token, given = _token_and_vectors(content)
    if (
        most := max((len(own) for own in given.values() if isinstance(own, np.ndarray) and own.ndim == 2), default=0)
    ) > MOST_VECTORS:
        raise CheckpointError(f"{path}: {most:,} vectors for one word, more than {MOST_VECTORS:,}")
    if not given or not all(_are_vectors(array) for array in given.values()):
        raise CheckpointError(
            f"{path}: not a textual inversion: holds {_summary(content)}, where one token has vectors [n D] or [D] of "
            f"finite numbers: under its name, 'string_to_param', 'emb_params', or {', '.join(map(repr, ENCODERS))}"
        )
    vectors = {encoder: np.atleast_2d(array).astype(np.float32) for encoder, array in given.items()}
    if len({len(array) for array in vectors.values()}) > 1:
        raise CheckpointError(f"{path}: the text encoders have different numbers of vectors: {_summary(content)}")
    token = token.strip() if isinstance(token, str) and len(token) <= weights.LONGEST_NAME else ""
    return TextualInversion(None if token in PLACEHOLDERS else token, vectors)


def word(path_or_hub_id: str | os.PathLike, given: str | None = None) -> str:
    """What prompts call the token of a file, a folder or a Hub repository: what is given, else its name in it, else its
    own name. Raises as `read`."""
    found = read(hub.resolve_file(path_or_hub_id, FILE_NAMES))
    return given or found.token or without_ending(Path(path_or_hub_id).name)


def _token_and_vectors(content: Any) -> tuple[str | None, dict[str | None, Any]]:
    if isinstance(content, np.ndarray):
        return None, {None: content}
    if not isinstance(content, Mapping):
        return None, {}
    if isinstance(content.get("string_to_param"), Mapping):
        parameters = list(content["string_to_param"].values())
        return content.get("name"), {None: parameters[0]} if len(parameters) == 1 else {}
    if "emb_params" in content:
        return None, {None: content["emb_params"]}
    if content.keys() <= ENCODERS.keys():
        return None, {encoder: content[name] for name, encoder in ENCODERS.items() if name in content}
    if len(content) == 1:
        [(token, array)] = content.items()
        return token, {None: array}
    return None, {}


def _are_vectors(array: Any) -> bool:
    """Whether these are numbers that are finite in float32."""
    if not isinstance(array, np.ndarray) or array.ndim not in (1, 2) or not array.size:
        return False
    return bool((np.abs(array.astype(np.float64)) <= LARGEST).all())


def _summary(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"an array {list(content.shape)}" if isinstance(content, np.ndarray) else f"a {type(content).__name__}"
    shown = [f"{str(name)[:60]} {list(getattr(content[name], 'shape', ()))}" for name in list(content)[:NAMES_SHOWN]]
    return f"{len(content)} entries: " + ", ".join(shown + ["…"] * (len(content) > NAMES_SHOWN))
