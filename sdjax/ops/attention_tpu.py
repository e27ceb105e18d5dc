"""Attention on TPUs: a Pallas kernel that keeps the scores of a head on the chip.

Tokens lie along the lanes and the D numbers of a head along the sublanes, so that a width of 40 is not padded to 128,
neither in the kernel nor in memory: the products before and after it write and read [B H D L] without a copy.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap

from sdjax.ops.attention_plain import with_plain_gradient

SUBLANES, LANES = 8, 128
QUERIES, KEYS = 512, 1024  # of which there are scores at a time
BLOCK = 2**20  # bytes of a head's keys, and as many of its values, on the chip at a time


def serves(q: Array, k: Array) -> bool:
    """Whether the kernel reads [B Lq H D] and [B Lk H D]: bfloat16 or float32, D in whole sublanes, keys in blocks."""
    keys, width = k.shape[1], k.shape[3]
    return (
        q.dtype in (jnp.bfloat16, jnp.float32)
        and width % SUBLANES == 0
        and keys_in_block(keys, width * q.dtype.itemsize) > 0
    )


def keys_in_block(keys: int, size: int) -> int:
    """All keys of a head, of `size` bytes, if they fit, else the most lanes that fit and divide them; 0 if none do."""
    most = BLOCK // size
    return keys if keys <= most else max((n for n in range(LANES, most + 1, LANES) if keys % n == 0), default=0)


@with_plain_gradient
def flash(q: Array, k: Array, v: Array) -> Array:
    """softmax(q k^T / sqrt(D)) v: [B Lq H D], [B Lk H D], [B Lk H D] -> [B Lq H D]

    The compiler does not split a kernel over several TPUs: there, it stands within a `shard_map`.
    """
    return tokens_last(*(x.transpose(0, 2, 3, 1) for x in (q, k, v))).transpose(0, 3, 1, 2)


@custom_vmap
def tokens_last(q: Array, k: Array, v: Array) -> Array:
    """`flash` of [B H D Lq], [B H D Lk], [B H D Lk] -> [B H D Lq]"""
    return call_kernel(q, k, v)


@tokens_last.def_vmap
def _(size: int, mapped: list[bool], *qkv: Array) -> tuple[Array, bool]:
    """A mapped axis is a larger batch."""
    qkv = [x if is_mapped else jnp.broadcast_to(x, (size, *x.shape)) for x, is_mapped in zip(qkv, mapped, strict=True)]
    out = tokens_last(*(x.reshape(-1, *x.shape[2:]) for x in qkv))
    return out.reshape(size, -1, *out.shape[1:]), True


def call_kernel(q: Array, k: Array, v: Array, *, interpret: bool = False) -> Array:
    """The kernel for each image, head, block of queries and block of keys."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (B, H, D, Lq), Lk, itemsize = q.shape, k.shape[3], q.dtype.itemsize
    queries, keys = min(QUERIES, Lq), keys_in_block(Lk, D * itemsize)
    grid = (B, H, pl.cdiv(Lq, queries), Lk // keys)
    of_queries = pl.BlockSpec((None, None, D, queries), lambda b, h, i, j: (b, h, 0, i))
    of_keys = pl.BlockSpec((None, None, D, keys), lambda b, h, i, j: (b, h, 0, j))
    statistic, accumulator = pltpu.VMEM((1, queries), jnp.float32), pltpu.VMEM((D, queries), jnp.float32)
    reads_of_keys = 1 if keys == Lk else grid[2]
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[of_queries, of_keys, of_keys],
        out_specs=of_queries,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_shapes=[statistic, statistic, accumulator],
        cost_estimate=pl.CostEstimate(
            flops=4 * B * H * D * Lq * Lk,
            transcendentals=B * H * Lq * Lk,
            bytes_accessed=2 * B * H * D * (Lq + Lk * reads_of_keys) * itemsize,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(q, k, v)


def kernel(q_ref, k_ref, v_ref, out_ref, top_ref, sum_ref, acc_ref) -> None:
    """out^T = v^T softmax(k q^T / sqrt(D)) for a block of queries [D q], reading a block of keys and values [D k].

    The softmax is over keys seen so far: their highest score [1 q], the sum of their weights [1 q] and their weighted
    values [D q] are kept from block to block (arXiv:2205.14135, algorithm 1).
    """
    from jax.experimental import pallas as pl

    (D, keys), block, blocks = k_ref.shape, pl.program_id(3), pl.num_programs(3)
    scale = D**-0.5 * math.log2(math.e)  # of scores, as powers of two
    q, at_once = q_ref[...], min(KEYS, keys)

    @pl.when(block == 0)
    def _() -> None:
        top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def product(a: Array, b: Array, axis: int) -> Array:
        return jax.lax.dot_general(
            a, b, (((axis,), (0,)), ((), ())), precision=precision(a), preferred_element_type=jnp.float32
        )

    def read(start: Array | int, count: int, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        chunk = pl.ds(pl.multiple_of(start, LANES), count)
        k, v = k_ref[:, chunk], v_ref[:, chunk]
        scores = product(k, q, 0)  # [D k], [D q] -> [k q]
        top = jnp.maximum(state[0], scores.max(0, keepdims=True))
        weights, shrink = jnp.exp2((scores - top) * scale), jnp.exp2((state[0] - top) * scale)
        values = product(v, weights.astype(v.dtype), 1)  # [D k], [k q] -> [D q]
        return top, shrink * state[1] + weights.sum(0, keepdims=True), shrink * state[2] + values

    state = (top_ref[...], sum_ref[...], acc_ref[...])
    state = jax.lax.fori_loop(0, keys // at_once, lambda i, state: read(i * at_once, at_once, state), state)
    if rest := keys % at_once:
        state = read(keys - rest, rest, state)
    top_ref[...], sum_ref[...], acc_ref[...] = state

    @pl.when(block == blocks - 1)
    def _() -> None:
        out_ref[...] = (acc_ref[...] / sum_ref[...]).astype(out_ref.dtype)


def precision(x: Array) -> jax.lax.Precision:
    """Of products of x, one of the two of kernels: the highest if JAX's setting for float32 is above bfloat16."""
    more = jax.config.jax_default_matmul_precision not in (None, "default", "bfloat16")
    return jax.lax.Precision.HIGHEST if more and x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
