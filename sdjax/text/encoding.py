"""What a pipeline is asked to read: prompts and their embeddings, checked, tokenized, one for each image."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import Array

from sdjax import arguments
from sdjax.text import prompts
from sdjax.text.tokenizer import CLIPTokenizer


class Text(NamedTuple):
    """A prompt for each image, as one text encoder reads it."""

    ids: Array | np.ndarray
    """[B C L] token ids in C chunks"""
    weights: Array | np.ndarray
    """[B C L] the weight of each token; 1: as it is"""


class Side(NamedTuple):
    """The prompt, or the negative prompt, as the caller gave it."""

    name: str
    prompt: str | Sequence[str] | None
    prompt_2: str | Sequence[str] | None
    embeds: Any
    pooled: Any

    @property
    def is_unsaid(self) -> bool:
        """Whether it is a negative prompt that the caller left out."""
        return self.name == "negative_prompt" and self.prompt is None

    def texts(self, encoder: str) -> list[str]:
        """What this text encoder is to read; a negative prompt that was left out is empty."""
        if self.is_unsaid:
            return [""]
        if encoder == "text_encoder_2" and self.prompt_2 is not None:
            return arguments.texts(f"{self.name}_2", self.prompt_2)
        return arguments.texts(self.name, self.prompt)


def tokenize(
    tokenizers: Mapping[str, CLIPTokenizer], sides: Sequence[Side], count: int, images: int
) -> list[list[Text]]:
    """For each side a Text for each text encoder, all of the same number of chunks.

    tokenizers: by text encoder. count: of prompts. Raises ValueError that names the argument.
    """
    texts = [[side.texts(encoder) for encoder in tokenizers] for side in sides]
    columns = [[text for side in texts for text in side[encoder]] for encoder in range(len(tokenizers))]
    batches = [prompts.batch(own, column) for own, column in zip(tokenizers.values(), columns, strict=True)]
    chunks = max((ids.shape[1] for ids, _ in batches), default=0)
    batches = [
        batch if batch[0].shape[1] == chunks else prompts.batch(own, column, chunks)
        for batch, own, column in zip(batches, tokenizers.values(), columns, strict=True)
    ]
    read = []
    for number, side in enumerate(sides):
        side_texts = []
        for encoder, (ids, weights) in enumerate(batches):
            first = sum(len(before[encoder]) for before in texts[:number])
            rows = slice(first, first + len(texts[number][encoder]))
            side_texts.append(
                Text(*(np.stack(arguments.per_image(side.name, a[rows], count, images)) for a in (ids, weights)))
            )
        read.append(side_texts)
    return read


def embeddings(side: Side, width: int, pooled: bool, count: int, images: int) -> dict[str, np.ndarray]:
    """{"encoder_hidden_states": [B L D]} and, where the UNet reads pooled text, {"text_embeds": [B P]}, as given.

    width: D. Raises ValueError that names the argument for another shape, and for pooled embeddings that are not wanted
    or not there.
    """
    given = {"encoder_hidden_states": (f"{side.name}_embeds", side.embeds, (None, None, width))}
    if pooled != (side.pooled is not None):
        raise ValueError(
            f"{side.name}: {'SDXL needs' if pooled else 'only SDXL takes'} pooled embeddings beside the others"
        )
    if pooled:
        prefix = "negative_" if side.name == "negative_prompt" else ""
        given["text_embeds"] = (f"{prefix}pooled_prompt_embeds", side.pooled, (None, None))
    return {
        key: np.stack(arguments.per_image(name, arguments.array(name, value, shape), count, images))
        for key, (name, value, shape) in given.items()
    }
