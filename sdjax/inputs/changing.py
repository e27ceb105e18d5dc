"""What the UNet is conditioned on where prompts change from row to row."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np

from sdjax.inputs.branches import branches_of
from sdjax.inputs.given import Given
from sdjax.inputs.guidance import Guidance
from sdjax.request import FIELDS, Request
from sdjax.request.kinds import TEXT
from sdjax.runtime import parallel
from sdjax.runtime.bounds import Load
from sdjax.sampling import Table
from sdjax.text import editing, prompts
from sdjax.text.conditioning import OF_TEXT, Condition
from sdjax.text.tokenizer import NOTHING

if TYPE_CHECKING:
    from sdjax.diffusion_pipeline import DiffusionPipeline

TEXTS = tuple(name for name, spec in FIELDS.items() if spec.kind is TEXT)


class Changes(NamedTuple):
    """A request as it is in each row."""

    requests: list[Request]
    """the different ones, in the order of their first rows"""
    places: np.ndarray
    """[R] which of them each row has"""


def changing_branches(
    pipe: "DiffusionPipeline",
    requests: Sequence[Request],
    given: Given,
    load: Load,
    guidance: Guidance,
    tables: Sequence[Table],
) -> tuple[tuple[Condition, ...], dict[str, np.ndarray]]:
    """What `branches_of` gives, and no column; where a prompt changes, its states [B V ...] for V texts, and
    {"variant": [R B]}, the place of that of each row."""
    words = next((tokenizer.word_pattern for tokenizer in pipe.text_tokenizers.values()), NOTHING)
    rows = max(map(len, tables))
    changes = [_changes(request, len(table), rows, words) for request, table in zip(requests, tables, strict=True)]
    variants = max(len(own.requests) for own in changes)
    if variants == 1:
        return branches_of(pipe, [own.requests[0] for own in changes], given, load, guidance), {}
    columns = [[own.requests[min(v, len(own.requests) - 1)] for own in changes] for v in range(variants)]
    chunks = max(_chunks(pipe, request) for column in columns for request in column)
    made = [branches_of(pipe, column, given, load, guidance, chunks) for column in columns]
    places = parallel.pad(
        np.stack([own.places for own in changes]), parallel.padded_size(len(requests), pipe.mesh.size)
    )
    branches = tuple(
        own[0] | {name: jnp.stack([one[name] for one in own], axis=1) for name in OF_TEXT if name in own[0]}
        for own in zip(*made, strict=True)
    )
    return branches, {"variant": places.T.astype(np.float32)}


def _changes(request: Request, rows: int, most: int, words: str) -> Changes:
    """rows: of the request's own table; most: of all of the batch, beyond which its last row stands."""
    texts = {name: text for name in TEXTS if (text := getattr(request, name))}
    by_row = {name: editing.by_row(text, rows, request.prompt_syntax, words) for name, text in texts.items()}
    every = [tuple(own[row] for own in by_row.values()) for row in range(rows)]
    different = list(dict.fromkeys(every))
    places = [different.index(own) for own in every]
    places += places[-1:] * (most - rows)
    return Changes([replace(request, **dict(zip(by_row, own, strict=True))) for own in different], np.array(places))


def _chunks(pipe: "DiffusionPipeline", request: Request) -> int:
    """How many chunks its longest text has."""
    syntax = request.prompt_syntax
    texts = [part for name in TEXTS for part in prompts.texts_of(name, getattr(request, name) or "", syntax)]
    tokenizers = pipe.text_tokenizers.values()
    return max((len(prompts.chunks(own, text, syntax)[0]) for own in tokenizers for text in texts), default=1)
