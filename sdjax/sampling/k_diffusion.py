"""Samplers of the probability-flow ODE dx / d level = epsilon, x = x0 + level * epsilon. Rows remember epsilon."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from sdjax.sampling.grid import Grid, Options
from sdjax.sampling.schedule import Array
from sdjax.sampling.table import Row, anchor, clipped, m0, m1, m2, m3, noise, x

LMS_ORDER = 4


def euler(grid: Grid, o: Options) -> Iterator[Row]:
    """x' = x + (s' - s) epsilon. Karras et al. 2022, algorithm 1 without its correction."""
    for t, (s, s_next) in zip(grid.t, pairwise(grid.levels), strict=True):
        yield Row(t, s, x + (s_next - s) * m0)


def ancestral_levels(s: float, s_next: float) -> tuple[float, float]:
    """(down, up): denoise from s to `down`, then add noise of deviation `up`; down^2 + up^2 = s_next^2.

    The DDPM posterior in noise levels: Song et al. 2020 (DDIM), eq. 16 with eta = 1.
    """
    up = s_next * np.sqrt(1 - (s_next / s) ** 2)
    return s_next**2 / s, up


def euler_ancestral(grid: Grid, o: Options) -> Iterator[Row]:
    """Euler to the lower ancestral level, then noise up to s'. k-diffusion, sample_euler_ancestral."""
    for t, (s, s_next) in zip(grid.t, pairwise(grid.levels), strict=True):
        down, up = ancestral_levels(s, s_next)
        yield Row(t, s, x + (down - s) * m0 + up * noise)


def heun(grid: Grid, o: Options) -> Iterator[Row]:
    """Euler to s', then again from the start with the mean of both slopes. Karras et al. 2022, algorithm 1.

    2 n - 1 rows: the last step, to level 0, is Euler's. The slope of a clipped x0 is epsilon - clipped / level; half of
    the first slope's part of it waits in the anchor.
    """
    for i, (s, s_next) in enumerate(pairwise(grid.levels)):
        h = s_next - s
        is_last = i + 1 == len(grid)
        yield Row(grid.t[i], s, x + h * (m0 - clipped / s), x - h / 2 * clipped / s, is_sample=is_last)
        if not is_last:
            yield Row(grid.t[i + 1], s_next, anchor + h / 2 * (m1 + m0 - clipped / s_next))


def dpm2(grid: Grid, o: Options) -> Iterator[Row]:
    """Midpoint rule in log level. Karras et al. 2022, algorithm 2 without its noise. 2 n - 1 rows."""
    for i, (s, s_next) in enumerate(pairwise(grid.levels)):
        yield from _midpoint(grid, i, s, s_next, up=0.0)


def dpm2_ancestral(grid: Grid, o: Options) -> Iterator[Row]:
    """The midpoint rule to the lower ancestral level, then noise. k-diffusion, sample_dpm_2_ancestral. 2 n - 1 rows."""
    for i, (s, s_next) in enumerate(pairwise(grid.levels)):
        down, up = ancestral_levels(s, s_next)
        yield from _midpoint(grid, i, s, down, up)


def _midpoint(grid: Grid, i: int, s: float, s_next: float, up: float) -> Iterator[Row]:
    middle = np.sqrt(s * s_next)  # 0, and the step is Euler's, where the run ends
    yield Row(grid.t[i], s, x + (middle - s) * m0, x, is_sample=not middle > 0)
    if middle > 0:
        yield Row(grid.schedule.timestep_at(middle), middle, anchor + (s_next - s) * m0 + up * noise)


def lagrange(nodes: Array, j: int) -> np.poly1d:
    """The polynomial that is 1 at nodes[j] and 0 at the others."""
    others = np.delete(nodes, j)
    return np.poly1d(others, r=True) / np.prod(nodes[j] - others)


def lms(grid: Grid, o: Options) -> Iterator[Row]:
    """x' = x + sum_j m_j * integral of the j-th Lagrange polynomial over s .. s': Adams-Bashforth on uneven steps.

    Order 4, less at the start. k-diffusion, sample_lms.
    """
    for i, (s, s_next) in enumerate(pairwise(grid.levels)):
        order = min(i + 1, LMS_ORDER)
        past = grid.levels[i - order + 1 : i + 1][::-1] - s
        weights = (lagrange(past, j).integ()(s_next - s) for j in range(order))
        yield Row(grid.t[i], s, x + sum(w * m for w, m in zip(weights, (m0, m1, m2, m3), strict=False)))
