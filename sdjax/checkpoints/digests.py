"""Hashes of networks and tokenizers: what tells them from others."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax import nnx

from sdjax.checkpoints.variables import get_value

DIGITS = 20

Part = bytes | jax.Array | np.ndarray


def digest_of(parts: Iterable[Part]) -> str:
    """20 hexadecimal digits of the SHA-256 of the SHA-256 of each part."""
    digest = hashlib.sha256()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for part in threads.map(_digest, parts):
            digest.update(part)
    return digest.hexdigest()[:DIGITS]


def model_parts(name: str, model: Any) -> Iterator[Part]:
    """The config of a network, and each parameter with its name, shape and dtype."""
    yield json_part({name: dataclasses.asdict(model.config)})
    for keys, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = get_value(variable)
        yield json_part([*map(str, keys), value.shape, str(value.dtype)])
        yield value


def tokenizer_part(name: str, tokenizer: Any) -> bytes:
    """The vocabulary, merges, special tokens and words of a tokenizer."""
    special = {key: str(token) for key, token in tokenizer.special_tokens.items()}
    words = {word: [ids[0], ids[-1] + 1] for word, ids in tokenizer.added_tokens.items()}
    return json_part({name: [tokenizer.vocab, tokenizer.merges, special, tokenizer.model_max_length, words]})


def json_part(value: Any) -> bytes:
    """What JSON has, and texts of all else."""
    return json.dumps(value, allow_nan=False, sort_keys=True, default=str).encode()


def _digest(part: Part) -> bytes:
    data = part if isinstance(part, bytes) else np.ascontiguousarray(part).reshape(-1).view(np.uint8)
    return hashlib.sha256(data).digest()
