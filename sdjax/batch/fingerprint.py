"""What tells one model from another, without reading all of it."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx

if TYPE_CHECKING:
    from sdjax.pipeline import StableDiffusionPipeline

SAMPLED = 256  # values of each parameter: training leaves none of them as it was
DIGEST_BYTES = 10


def fingerprint(pipe: "StableDiffusionPipeline") -> str:
    """20 hexadecimal digits of all that a picture depends on beside its item.

    BLAKE2b of every parameter's name, shape, dtype and about 256 evenly spaced values, with the LoRAs that are set, and
    of the configs, tokenizers, learned words and noise schedule. Cheapest before the first picture, while the
    parameters are on the host.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in _parts(pipe):
        digest.update(part)
    return digest.hexdigest()


def _parts(pipe: "StableDiffusionPipeline") -> Iterator[bytes]:
    yield _json({"pipeline": pipe.config, "scheduler": dict(pipe.scheduler.config)})
    for name, model in pipe.models.items():
        yield _json({name: dataclasses.asdict(model.config)})
        for keys, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
            value = variable.get_value()
            yield _json([*map(str, keys), value.shape, str(value.dtype)])
            yield _sample(value)
    for name, tokenizer in pipe.tokenizers.items():
        special = {key: str(token) for key, token in tokenizer.special_tokens.items()}
        words = {word: [ids.start, ids.stop] for word, ids in tokenizer.added_tokens.items()}
        yield _json({name: [tokenizer.vocab, tokenizer.merges, special, tokenizer.model_max_length, words]})
    for name, vectors in pipe._added.items():
        yield _json([name, vectors.shape]) + np.ascontiguousarray(vectors).tobytes()


def _sample(value: jax.Array | np.ndarray) -> bytes:
    flat = np.asarray(value).reshape(-1)
    return flat[:: max(1, flat.size // SAMPLED)].tobytes()


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()
