"""How a text encoder and a UNet come to agree on which token speaks of which part of a picture.

A picture is cut into n x n squares, and the last n^2 tokens of a caption speak of one each, row by row.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from sdjax.models import UNet2DConditionModel
from sdjax.models.attention import BasicTransformerBlock, split_heads


class Sketch(nnx.Module):
    """The latents that a linear map makes of the last n^2 tokens: [B L D] -> [B size size C]

    The map is the same for all squares. It teaches a text encoder what pictures look like, without a UNet.
    """

    def __init__(self, hidden_size: int, size: int, channels: int, squares: int):
        self.size, self.squares = size, squares
        # zeros: an untrained map gives a trained text encoder no gradient
        zeros = nnx.initializers.zeros_init()
        self.to_square = nnx.Linear(hidden_size, (size // squares) ** 2 * channels, kernel_init=zeros, rngs=nnx.Rngs(0))

    def __call__(self, hidden_states: Array) -> Array:
        B, n, side = len(hidden_states), self.squares, self.size // self.squares
        x = self.to_square(hidden_states[:, -n * n :].astype(jnp.float32))
        return x.reshape(B, n, n, side, side, -1).swapaxes(2, 3).reshape(B, self.size, self.size, -1)

    def error(self, hidden_states: Array, latents: Array) -> Array:
        """The mean squared difference from these latents, by picture: [B]"""
        return ((self(hidden_states) - latents) ** 2).mean(axis=(1, 2, 3))


def square_tokens(size: int, squares: int, length: int) -> np.ndarray:
    """The token, of `length`, that speaks of each place of a map of size x size places, row by row: [size^2]"""
    square = np.arange(size) * squares // size
    return (length - squares**2 + squares * square[:, None] + square).ravel()


def looked_at(size: int, squares: int, length: int, heads: int) -> np.ndarray:
    """The token that each head is to look at from each place of a map of size x size places: [heads size^2]

    The places of a square are shared among the heads: one of them looks at the square's token, the others at the first,
    which says nothing. So what a head reads can be about this place alone, though the token is about many.
    """
    parts = max(size // squares, 1)
    part = np.arange(size) % parts
    part = (parts * part[:, None] + part).ravel()
    own = square_tokens(size, squares, length)
    return np.where(np.arange(heads)[:, None] % parts**2 == part, own, 0)


def with_reading_error(
    unet: UNet2DConditionModel, squares: int, x: Array, t: Array, hidden_states: Array
) -> tuple[Array, Array]:
    """The UNet's prediction, and the mean of -log p over its transformer blocks, heads, places and images.

    p is the share of its attention that a head gives to the token of `looked_at`. By itself a UNet learns only slowly
    that what belongs to a place can be looked up there.
    """
    prediction, seen = nnx.capture(unet, nnx.Intermediate, method_outputs=nnx.Intermediate)(x, t, hidden_states)
    outputs = {path[:-1]: value.get_value()[0] for path, value in nnx.to_flat_state(seen)}
    errors = []
    for path, block in nnx.iter_graph(unet):
        if isinstance(block, BasicTransformerBlock):
            readers = ("attn1", "attn2") if block.only_cross_attention else ("attn2",)
            side_by_side = (
                jnp.concatenate([outputs[*path, name, f"to_{x}"] for name in readers], axis=-1) for x in "qk"
            )
            q, k = (split_heads(y, len(readers) * block.attn2.heads) for y in side_by_side)
            logits = jnp.einsum("blhd,bmhd->bhlm", q, k).astype(jnp.float32) / np.sqrt(q.shape[-1])
            tokens = looked_at(math.isqrt(q.shape[1]), squares, k.shape[1], q.shape[2])
            there = jax.nn.one_hot(tokens, k.shape[1])  # a gather's gradient takes XLA seconds to fold
            errors.append(-(there * jax.nn.log_softmax(logits)).sum(axis=-1).mean())
    return prediction, jnp.mean(jnp.stack(errors))
