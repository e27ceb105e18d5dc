"""The sketch: which token speaks of which square, and whether a UNet looks there."""

import jax.numpy as jnp
import numpy as np
import oracle
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from flax import nnx
from oracle import SD2, nchw, nhwc, normal
from sketch import Sketch, looked_at, square_tokens, with_reading_error

from sdjax.models import UNet2DConditionModel


def test_each_of_the_last_tokens_draws_one_square():
    sketch = Sketch(hidden_size=3, size=8, channels=2, squares=4)
    sketch.to_square.kernel[...] = jnp.zeros((3, 2 * 2 * 2)).at[1].set(jnp.arange(8.0))
    hidden_states = np.zeros((2, 20, 3), np.float32)
    hidden_states[1, 4 + 4 * 2 + 3, 1] = 1.0  # the third row, the fourth column
    expected = np.zeros((2, 8, 8, 2))
    expected[1, 4:6, 6:8] = np.arange(8).reshape(2, 2, 2)  # rows, columns, channels
    np.testing.assert_array_equal(sketch(hidden_states), expected)
    np.testing.assert_allclose(sketch.error(hidden_states, expected + 0.5), [0.25, 0.25])


def test_a_place_belongs_to_the_token_of_its_square():
    tokens = square_tokens(8, 4, 32).reshape(8, 8)
    assert tokens[0, 0] == tokens[1, 1] == 16
    assert tokens[2, 5] == 16 + 4 + 2
    assert tokens[7, 7] == 31
    np.testing.assert_array_equal(square_tokens(4, 4, 16), np.arange(16))


def test_the_places_of_a_square_share_the_heads():
    tokens = looked_at(16, 4, 32, heads=16).reshape(16, 16, 16)
    assert (np.count_nonzero(tokens, axis=0) == 1).all()  # one head a place looks at the token of its square
    np.testing.assert_array_equal(tokens.max(axis=0).ravel(), square_tokens(16, 4, 32))
    head_of = tokens[:, 8:12, 4:8].argmax(axis=0)
    np.testing.assert_array_equal(head_of, np.arange(16).reshape(4, 4))
    np.testing.assert_array_equal(looked_at(4, 4, 32, heads=3), np.tile(square_tokens(4, 4, 32), (3, 1)))


def test_reading_error_is_that_of_the_attention_in_pytorch(tmp_path, monkeypatch):
    reference = oracle.unet({**SD2.unet, "only_cross_attention": (True, False)})
    reference.save_pretrained(tmp_path)
    model = UNet2DConditionModel.from_pretrained(tmp_path)
    x, states = normal(2, 8, 8, 4), normal(2, 20, 24, seed=1)
    reference.set_attn_processor(AttnProcessor())
    shares, scores = {4: [], 8: []}, Attention.get_attention_scores

    def record(attention, query, key, mask=None):
        probabilities = scores(attention, query, key, mask)
        if attention.is_cross_attention:
            shares[int(query.shape[1] ** 0.5)].append(probabilities.unflatten(0, (2, attention.heads)))
        return probabilities

    monkeypatch.setattr(Attention, "get_attention_scores", record)
    expected = reference(nchw(x), torch.tensor(900), torch.from_numpy(states)).sample
    prediction, error = nnx.jit(with_reading_error, static_argnums=1)(model, 4, x, jnp.int32(900), states)
    oracle.assert_close(prediction, nhwc(expected))

    both = [torch.cat(pair, dim=1) for pair in zip(shares[8][::2], shares[8][1::2], strict=True)]  # attn1, attn2
    assert [share.shape for share in (*shares[4], *both)] == [(2, 8, 16, 20)] + 3 * [(2, 4, 64, 20)]
    errors = []
    for size, blocks in ((4, shares[4]), (8, both)):
        for share in blocks:
            tokens = torch.from_numpy(looked_at(size, 4, 20, share.shape[1]))
            errors.append(-share.gather(3, tokens.expand(2, -1, -1)[..., None]).log().mean())
    np.testing.assert_allclose(error, torch.stack(errors).mean().numpy(), rtol=1e-5)
