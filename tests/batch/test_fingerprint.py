"""A fingerprint tells models apart by each of their values."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sdjax.batch.fingerprint import fingerprint
from sdjax.pipeline import StableDiffusionPipeline


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def pipe(request, sd1_folder):
    return StableDiffusionPipeline.from_pretrained(sd1_folder, dtype=request.param)


def test_the_same_model_has_the_same(pipe, sd1_folder):
    again = StableDiffusionPipeline.from_pretrained(sd1_folder, dtype=pipe.unet.conv_in.kernel.dtype)
    assert fingerprint(pipe) == fingerprint(again)
    assert len(bytes.fromhex(fingerprint(pipe))) == 10


def test_every_value_counts(pipe):
    """One value of each parameter, at a place of its own; sampling would miss most."""
    whole, draw, found = fingerprint(pipe), np.random.default_rng(0), set()
    parameters = [
        variable for model in pipe.models.values() for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    ]
    parameters = sorted(parameters, key=lambda variable: -variable.get_value().size)[::12]
    for variable in parameters:
        kept = variable.get_value()
        changed = np.array(kept)
        place = draw.integers(changed.size)
        changed.reshape(-1)[place] = np.nextafter(np.float32(changed.reshape(-1)[place]), 9).astype(changed.dtype) + 1
        variable.set_value(jnp.asarray(changed))
        found.add(fingerprint(pipe))
        variable.set_value(kept)
    assert len(found) == len(parameters) and whole not in found
    assert fingerprint(pipe) == whole


def test_a_row_of_the_vocabulary_counts(pipe):
    """An embedding that a user edited by hand."""
    embedding = pipe.text_encoder.text_model.embeddings.token_embedding.embedding
    kept, before = embedding.get_value(), fingerprint(pipe)
    for row in (0, 100, len(kept) - 1):
        embedding.set_value(kept.at[row].multiply(2))
        assert fingerprint(pipe) != before
    embedding.set_value(kept)


def test_places_count(pipe):
    """Two values of a parameter in each other's place."""
    kernel = pipe.unet.conv_in.kernel
    kept, before = kernel.get_value(), fingerprint(pipe)
    kernel.set_value(kept[..., ::-1])
    assert fingerprint(pipe) != before
    kernel.set_value(
        np.asarray(kept).transpose(1, 0, 2, 3).copy().transpose(1, 0, 2, 3)
    )  # the same, laid out otherwise
    assert fingerprint(pipe) == before
    kernel.set_value(kept)
