"""sdjax.ops.activations against PyTorch's in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracle import assert_close

from sdjax.ops.activations import geglu, gelu, quick_gelu, silu


def exact_geglu(x):
    a, b = x.chunk(2, dim=-1)
    return a * torch.nn.functional.gelu(b)


EXACT = {
    silu: torch.nn.functional.silu,
    gelu: torch.nn.functional.gelu,
    quick_gelu: lambda x: x * torch.sigmoid(1.702 * x),
    geglu: exact_geglu,
}
X = np.linspace(-12, 12, 2**12, dtype=np.float32).reshape(64, 64).T  # small and large numbers in each row


@pytest.mark.parametrize("ours", EXACT, ids=lambda f: f.__name__)
def test_activations_are_those_of_pytorch(ours):
    theirs = EXACT[ours](torch.from_numpy(X).double()).numpy()
    assert_close(jax.jit(ours)(X), theirs, 1e-6)


@pytest.mark.parametrize("ours", EXACT, ids=lambda f: f.__name__)
def test_bfloat16_is_rounded_once(ours):
    x = jnp.asarray(X, jnp.bfloat16)
    theirs = EXACT[ours](torch.from_numpy(np.asarray(x, np.float64))).numpy()
    y = jax.jit(ours)(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), theirs, rtol=2**-8, atol=1e-6)
