"""Attention on NVIDIA GPUs: cuDNN's flash attention."""

import functools

import jax
from jax import Array
from jax.typing import DTypeLike

from sdjax.ops.attention_plain import with_plain_gradient

AMPERE = 8  # the first compute capability that cuDNN's kernels run on


def serves(q: Array, k: Array) -> bool:
    """Whether cuDNN has a kernel for [B Lq H D] and [B Lk H D] on the GPUs of this process.

    It has for float16 and bfloat16 and head widths that are multiples of 8 up to 128 (256 from Hopper on).
    """
    return is_served(q.shape, k.shape, q.dtype)


@functools.cache
def is_served(q: tuple[int, ...], k: tuple[int, ...], dtype: DTypeLike) -> bool:
    q, k = jax.ShapeDtypeStruct(q, dtype), jax.ShapeDtypeStruct(k, dtype)
    try:
        oldest = min(float(gpu.compute_capability) for gpu in jax.local_devices(backend="cuda"))
        jax.eval_shape(fused, q, k, k)
    except (RuntimeError, NotImplementedError):  # no CUDA or no cuDNN here, no such kernel
        return False
    return oldest >= AMPERE


def fused(q: Array, k: Array, v: Array) -> Array:
    """softmax(q k^T / sqrt(D)) v by cuDNN: [B Lq H D], [B Lk H D], [B Lk H D] -> [B Lq H D]

    JAX refuses to differentiate it for odd numbers of tokens, such as the 77 of a caption; then the gradient is plain.
    """
    is_odd = q.shape[1] % 2 or k.shape[1] % 2
    return (with_plain_gradient(_cudnn) if is_odd else _cudnn)(q, k, v)


def _cudnn(q: Array, k: Array, v: Array) -> Array:
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
