"""What the text encoders of a pipeline read: prompts tokenized, or embeddings in their place, one for each image."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import Array

from sdjax.request import spread
from sdjax.request.values import PLAIN
from sdjax.text import prompts
from sdjax.text.tokenizer import CLIPTokenizer


class Text(NamedTuple):
    """A prompt for each image, as one text encoder reads it."""

    ids: Array | np.ndarray
    """[B C L] token ids in C chunks"""
    weights: Array | np.ndarray
    """[B C L] the weight of each token; 1: as it is"""


def tokenize(
    tokenizers: Mapping[str, CLIPTokenizer],
    texts: Mapping[str, Mapping[str, Sequence[str]]],
    syntax: str = "web-ui",
    check: Callable[[int], Any] = lambda tokens: None,
    least: int = 0,
) -> dict[str, list[Text]]:
    """For each branch a Text for each text encoder, all of the same number of chunks, `least` or more.

    tokenizers: by text encoder. texts: by branch and text encoder, one for each image. check: called with the number of
    tokens that each text will have, before arrays of them are made. Warns (UserWarning) of what is cut off in the plain
    syntax. Raises ValueError as `prompts.parse`.
    """
    unique = {
        encoder: list(dict.fromkeys(text for branch in texts.values() for text in branch[encoder]))
        for encoder in tokenizers
    }
    if syntax == PLAIN:
        _warn_of_cut(tokenizers, unique)
    read = {
        encoder: [prompts.chunks(tokenizer, text, syntax) for text in unique[encoder]]
        for encoder, tokenizer in tokenizers.items()
        if texts
    }
    shapes = [ids.shape for own in read.values() for ids, _ in own]
    count = max((chunks for chunks, _ in shapes), default=0) and max(least, *(chunks for chunks, _ in shapes))
    check(count * max((length for _, length in shapes), default=0))
    tokens = {}
    for encoder, own in read.items():
        ids, weights = prompts.batch(tokenizers[encoder], own, count)
        places = {text: place for place, text in enumerate(unique[encoder])}
        for name, branch in texts.items():
            rows = [places[text] for text in branch[encoder]]
            tokens.setdefault(name, []).append(Text(ids[rows], weights[rows]))
    return tokens


def _warn_of_cut(tokenizers: Mapping[str, CLIPTokenizer], texts: Mapping[str, Sequence[str]]) -> None:
    cut = {own.truncated(text): own.model_max_length for name, own in tokenizers.items() for text in texts[name]}
    cut.pop("", None)
    if cut:
        warnings.warn(
            f"prompts are cut at {min(cut.values())} tokens, left out: {', '.join(map(repr, cut))}", stacklevel=2
        )


class Embeddings(NamedTuple):
    """Text states in place of a prompt, [prompts or B, L, D], and for SDXL pooled ones, [prompts or B, P]."""

    states: Any
    pooled: Any
    prompts: int

    def condition(self, prefix: str, width: int, pooled: bool, images: int) -> dict[str, np.ndarray]:
        """{"encoder_hidden_states": [B L D]} and, where the UNet reads pooled text, {"text_embeds": [B P]}.

        prefix: "negative_" or "". width: D. Raises ValueError that names the argument for another shape, and for pooled
        embeddings that are not wanted or not there.
        """
        if pooled != (self.pooled is not None):
            raise ValueError(
                f"{prefix}prompt: {'SDXL needs' if pooled else 'only SDXL takes'} pooled embeddings beside the others"
            )
        given = {"encoder_hidden_states": (f"{prefix}prompt_embeds", self.states, (None, None, width))}
        if pooled:
            given["text_embeds"] = (f"{prefix}pooled_prompt_embeds", self.pooled, (None, None))
        return {
            key: np.stack(spread(name, array(name, value, shape), (self.prompts, images), "images"))
            for key, (name, value, shape) in given.items()
        }


def array(name: str, value: Any, shape: tuple[int | None, ...]) -> np.ndarray:
    """A finite float32 array of this shape (None: any length), also of a tensor of PyTorch. Raises ValueError naming
    both shapes."""
    try:
        value = np.asarray(value.detach().float().cpu() if hasattr(value, "detach") else value)
        if value.dtype.kind in "cSU":  # whose numbers would lose a part, or are text
            raise TypeError(f"of {value.dtype}")
        value = value.astype(np.float32)
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:  # of PyTorch: sparse, without data
        raise ValueError(f"{name} must be an array of numbers: {error}") from None
    if value.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, value.shape, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} must have shape [{wanted}], not {list(value.shape)}")
    if not np.isfinite(value).all():
        raise ValueError(f"{name} has values that are not finite")
    return value
