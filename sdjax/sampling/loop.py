"""The loop that runs a sampler's table. It knows no model.

Everything here can be jitted, vmapped, pmapped, sharded and differentiated.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sdjax.sampling import Table
from sdjax.sampling.guidance import Clean, Guide, Model, branched, over, text_weights, unguided, weighted
from sdjax.sampling.noise import initial_noise, row_noise

REMEMBERED = 4

jax.tree_util.register_dataclass(Table, [field.name for field in dataclasses.fields(Table)], [])


class State(NamedTuple):
    """What a sampler remembers from row to row, images first."""

    x: Array
    """[B ...] the sample"""
    anchor: Array
    """[B ...] a second sample, for samplers that come back to where they were"""
    outputs: Array
    """[B 4 ...] the last model outputs, newest first"""


class Known(NamedTuple):
    """What is put back into x after each row: what is known of the sample beforehand (inpainting)."""

    mask: Array
    """[B h w 1] 1 where the sample is made, 0 where it is known; between, where it is known for the first rows"""
    clean: Array
    """[B h w C]"""
    noise: Array
    """[B h w C] the initial noise"""


Rows = dict[str, Array]
"""Columns of a table, float32 (`draw` int32), each with a row axis and an image axis (or a part of these). Beside them,
where noise is given, `noise` [R B ...], each row's draw; where a part of the sample is known, `after` [R B 3], how much
of the clean sample and of the noise x is made of after each row, and the mask up to which that is put back; and with K
ControlNets `control` [R B K], the weight of each; and, where prompts change, `variant` [R B], the place of a text"""

COLUMNS = {
    "t": 0,
    "cin": 0,
    "skip": 0,
    "out": 0,
    "mix": 2,
    "denoised": 1,
    "clip": 0,
    "keep": 0,
    "guidance": 0,
    "draw": 0,
    "threshold": 1,
}
"""The columns of a table and how many axes a coefficient has beside row and image; tables may be without the last"""


def rows(table: Table, images: int) -> Rows:
    """The columns of COLUMNS: mix [R B 2 8], denoised [R B 2], threshold [R B 2] if there is one, the others [R B].

    A table that has no image axis serves all images.
    """

    def per_image(column: Any, tail: int) -> Array:
        column = jnp.asarray(column, _dtype(column))
        column = column if column.ndim == 2 + tail else column[:, None]
        return jnp.broadcast_to(column, (column.shape[0], images, *column.shape[2:]))

    own = ((getattr(table, name), name, tail) for name, tail in COLUMNS.items())
    return {name: per_image(column, tail) for column, name, tail in own if column is not None}


def _dtype(column: Any) -> Any:
    return np.int32 if np.issubdtype(column.dtype, np.integer) else np.float32


def scaled(noise: Array, init_noise_sigma: Array) -> Array:
    """Where text-to-image starts: noise [B ...] times a table's `init_noise_sigma` (one number, or one an image)."""
    sigma = jnp.asarray(init_noise_sigma, jnp.float32)
    return over(jnp.broadcast_to(sigma, noise.shape[:1]), noise) * noise


def start(x: Array) -> State:
    """The state before the first row."""
    x = jnp.asarray(x, jnp.float32)
    return State(x, x, jnp.zeros((x.shape[0], REMEMBERED, *x.shape[1:]), jnp.float32))


def step(
    f: Model, state: State, row: Rows, noise: Array, guide: Guide = unguided, known: Known | None = None
) -> tuple[State, Array]:
    """One row, in float32; see `Table`.

    m = skip x + out guide(f(cin x, t)) (+ r clipped);  (x, anchor) = mix (x, anchor, m, three before, noise, clipped)

    Where a part of the sample is known: x = after[0] clean + after[1] noise where mask <= after[2] (RePaint,
    arXiv:2201.09865, eq. 8, without its resampling; differential diffusion, arXiv:2306.00950, with a soft mask).

    Returns the new state and the row's estimate of the clean sample, for previews.
    """
    x = state.x
    of_x, of_m = row["denoised"][:, 0], row["denoised"][:, 1]
    clean = Clean(over(of_x + of_m * row["skip"], x) * x, of_m * row["out"])
    prediction = guide(f(over(row["cin"], x) * x, row["t"]), row["guidance"], clean).astype(jnp.float32)
    m = over(row["skip"], x) * x + over(row["out"], x) * prediction
    denoised = over(of_x, x) * x + over(of_m, x) * m
    clipped = jnp.clip(denoised, -over(row["clip"], x), over(row["clip"], x)) - denoised
    if "threshold" in row:
        quantile, added = row["threshold"][:, 0], row["threshold"][:, 1]
        clipped = jnp.where(over(quantile, x) > 0, _thresholded(denoised, quantile, row["clip"]) - denoised, clipped)
        m += over(added, x) * clipped
    outputs = jnp.concatenate([m[:, None], state.outputs[:, :-1]], axis=1)
    terms = jnp.concatenate([x[:, None], state.anchor[:, None], outputs, noise[:, None]], axis=1)
    mixed = jnp.einsum("bij,bj...->bi...", row["mix"][..., :-1], terms, precision="highest")
    mixed += over(row["mix"][..., -1], mixed) * clipped[:, None]
    remembered = jnp.where(over(row["keep"], outputs) > 0, outputs, state.outputs)
    x = mixed[:, 0]
    if known is not None:
        kept = over(row["after"][:, 0], x) * known.clean + over(row["after"][:, 1], x) * known.noise
        x = jnp.where(known.mask > over(row["after"][:, 2], x), x, kept)
    return State(x, mixed[:, 1], remembered), denoised + clipped


def _thresholded(x: Array, quantile: Array, most: Array) -> Array:
    """clip(x, -s, s) / s, s the quantile [B] of |x| of each image, from 1 to `most` [B] (arXiv:2205.11487, 2.3)."""
    values = jnp.abs(x).reshape(len(x), -1)
    s = over(jnp.minimum(jnp.maximum(jax.vmap(jnp.quantile)(values, quantile), 1), most), x)
    return jnp.clip(x, -s, s) / s


def denoise(f: Model, table: Table, x: Array, noise: Callable[[Array], Array], guide: Guide = unguided) -> Array:
    """Runs a table: one `lax.scan`, one call of f for each row. Returns the clean sample [B ...], float32.

    A gradient keeps the state of each row alone and computes the row anew (`jax.checkpoint`): its memory is that of one
    call of f however many rows there are; each row is evaluated once more.

    f: (cin x [B ...], t [B]) -> prediction [B ...], or the predictions that `guide` combines. x [B ...]: for
    text-to-image, standard normal noise times `table.init_noise_sigma`. noise: draw numbers [B] -> standard normal
    [B ...], which deterministic samplers multiply by 0.
    """

    @partial(jax.checkpoint, prevent_cse=False)  # a scan keeps the two computations apart by itself
    def body(state: State, row: Rows) -> tuple[State, None]:
        return step(f, state, row, noise(row["draw"]), guide)[0], None

    return jax.lax.scan(body, start(x), rows(table, len(x)))[0].x


def denoise_segment(
    f: Callable[[Rows], Model],
    state: State,
    denoised: Array,
    segment: tuple[Array, Rows],
    noise: Callable[[Array], Array],
    guide: Guide = unguided,
    known: Known | None = None,
) -> tuple[State, Array]:
    """Runs the active rows of a segment (active [K], rows [K B ...]); the others cost nothing.

    One program serves every number of rows, where `denoise` is another program for every table length. f: of a row.
    Noise that is among the rows stands in place of that of their draw numbers.
    """

    def body(carry: tuple[State, Array], scanned: tuple[Array, Rows]) -> tuple[tuple[State, Array], None]:
        active, row = scanned

        def run() -> tuple[State, Array]:
            drawn = row["noise"] if "noise" in row else noise(row["draw"])
            return step(f(row), carry[0], row, drawn, guide, known)

        return jax.lax.cond(active, run, lambda: carry), None

    return jax.lax.scan(body, (state, denoised), segment)[0]


class Segment(NamedTuple):
    """Consecutive rows of a stacked table that are dispatched together, and what the host knows of them."""

    rows: tuple[np.ndarray, Rows]
    """what `denoise_segment` runs"""
    first: int
    """the place of its first row in the table"""
    guided: bool
    """whether any image has guidance in these rows; it is the same in all of them"""
    renewed: bool
    """whether features that are kept from row to row are computed anew at its first row"""


def first_row(rows: Rows) -> Rows:
    """The columns of the first of some rows, without its noise and what is put back after it."""
    return {name: column[0] for name, column in rows.items() if name in (*COLUMNS, "control", "variant")}


def host_columns(table: Table) -> dict[str, np.ndarray]:
    """The columns of COLUMNS that a table has, on the host, in the dtypes of `Rows`."""
    columns = {name: column for name in COLUMNS if (column := getattr(table, name)) is not None}
    return {name: column.astype(_dtype(column)) for name, column in columns.items()}


def segments(
    table: Table,
    length: int,
    active: int,
    cache_interval: int | None = None,
    beside: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> Iterator[Segment]:
    """A stacked table in segments of `length` rows of which the first `active`, or fewer, do something.

    A segment has rows with guidance or rows without. Features are renewed every `cache_interval` rows (None: never but
    there) and where guidance begins or ends. beside: columns beside those of the table, see `Rows`.
    """
    columns = {**host_columns(table), **beside}
    guided = table.guidance.any(axis=1)
    changes = 1 + np.flatnonzero(guided[1:] != guided[:-1])
    for begin, end in itertools.pairwise([0, *changes, len(table)]):
        for renewed in range(begin, end, cache_interval or end):
            until = min(end, renewed + (cache_interval or end))
            for first in range(renewed, until, active):
                numbers = first + np.arange(length)
                taken = np.minimum(numbers, len(table) - 1)
                rows = {name: column[taken] for name, column in columns.items()}
                is_active = numbers < min(first + active, until)
                yield Segment((is_active, rows), first, bool(guided[first]), first == renewed)


def text_to_latents(
    conditions: Callable[[Any, Any, Array], Sequence[Any]],
    predict: Callable[[Any, Array, Array, Any], Array],
    shape: tuple[int, ...],
) -> Callable[..., Array]:
    """The pure function under the pipeline: sample(params, tokens, keys, table, guidance_scale) -> latents [B *shape].

    conditions(params, tokens, guidance_scale) -> those of the negative prompt and the prompt, or of the prompt alone,
    which has no guidance; predict(params, x, t, condition) as in `guidance.branched`; shape: of one image.
    keys: `seed_keys(seeds)` [B 2]; guidance_scale [B]. Latents are as the UNet sees them: divide by the VAE's
    scaling_factor before decoding.
    """

    def sample(params: Any, tokens: Any, keys: Array, table: Table, guidance_scale: Array) -> Array:
        branches = conditions(params, tokens, guidance_scale)
        f = branched(partial(predict, params), branches)
        guide = weighted(text_weights(guidance_scale)) if len(branches) > 1 else unguided
        x = scaled(initial_noise(keys, shape), table.init_noise_sigma)
        return denoise(f, table, x, partial(row_noise, keys, shape=shape), guide)

    return sample
