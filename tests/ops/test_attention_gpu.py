"""Which attention runs in cuDNN, by the program that is lowered for a GPU: none is needed for that."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from oracle import assert_close, normal

from sdjax.ops import attention_gpu
from sdjax.ops.attention import attention
from sdjax.ops.attention_plain import plain


@pytest.fixture(params=["8.0"])
def gpu(request, monkeypatch):
    """JAX believes to see a GPU of that compute capability, and cuDNN 9.10."""
    capability = request.param
    local_devices = jax.local_devices

    def pretended(*args, backend=None, **kw):
        return [SimpleNamespace(compute_capability=capability)] if backend == "cuda" else local_devices(*args, **kw)

    def at_least(wanted):
        return float(capability) >= float(wanted)

    monkeypatch.setattr(jax, "local_devices", pretended)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", at_least)
    attention_gpu.is_served.cache_clear()
    yield
    attention_gpu.is_served.cache_clear()


def program(queries: int, keys: int, heads: int, width: int, dtype: str, platform: str, f=attention) -> str:
    q, k = (jax.ShapeDtypeStruct((2, tokens, heads, width), dtype) for tokens in (queries, keys))
    fresh = jax.jit(lambda *qkv: f(*qkv))  # one that was traced for another GPU would be remembered
    return fresh.trace(q, k, k).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("gpu", "queries", "keys", "heads", "width", "dtype", "expected"),
    [
        ("8.0", 4096, 4096, 8, 40, "bfloat16", 1),
        ("8.0", 4096, 77, 8, 40, "bfloat16", 1),
        ("8.0", 1024, 1024, 20, 64, "float16", 1),
        ("8.0", 4096, 4096, 8, 40, "float32", 0),
        ("8.0", 256, 256, 8, 160, "bfloat16", 0),
        ("9.0", 256, 256, 8, 160, "bfloat16", 1),
        ("9.0", 4096, 4096, 1, 512, "bfloat16", 0),
        ("8.9", 4096, 4096, 8, 36, "bfloat16", 0),
        ("7.5", 4096, 4096, 8, 40, "float16", 0),
        ("12.0", 4096, 4096, 8, 40, "bfloat16", 1),
    ],
    indirect=["gpu"],
)
def test_which_attention_of_stable_diffusion_runs_in_cudnn(gpu, queries, keys, heads, width, dtype, expected):
    assert program(queries, keys, heads, width, dtype, "cuda").count("@__cudnn$fmha") == expected


@pytest.mark.parametrize("platform", ["cpu", "rocm"])
def test_other_platforms_have_no_cudnn(gpu, platform):
    assert "cudnn" not in program(4096, 4096, 8, 40, "bfloat16", platform)


def gradients_of(form):
    return jax.grad(lambda *qkv: (form(*qkv).astype(jnp.float32) ** 2).sum(), argnums=(0, 1, 2))


@pytest.mark.parametrize(("keys", "backward"), [(4096, 1), (77, 0)])  # JAX refuses an odd number of tokens
def test_its_gradient_runs_in_cudnn_too_where_it_can(gpu, keys, backward):
    text = program(4096, keys, 8, 40, "bfloat16", "cuda", gradients_of(attention))
    assert text.count("@__cudnn$fmha") == 1 + backward
    assert text.count("@__cudnn$fmhaSoftmaxBackward") == backward


def test_the_gradient_for_odd_numbers_of_tokens_is_right(monkeypatch):
    monkeypatch.setattr(attention_gpu, "_cudnn", plain)
    inputs = normal(2, 6, 3, 8), normal(2, 7, 3, 8, seed=1), normal(2, 7, 3, 8, seed=2)
    both = (gradients_of(form)(*inputs) for form in (attention_gpu.fused, plain))
    for ours, expected in zip(*both, strict=True):
        assert_close(ours, expected)


def test_without_a_gpu_programs_for_one_are_plain():
    assert "cudnn" not in program(4096, 4096, 8, 40, "bfloat16", "cuda")
