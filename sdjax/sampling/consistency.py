"""Samplers of distilled models: LCM and TCD. Rows remember x0."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from sdjax.sampling.grid import Grid, Options
from sdjax.sampling.schedule import variance_preserving
from sdjax.sampling.table import Row, clipped, m0, noise, x

SIGMA_DATA = 0.5


def lcm(grid: Grid, o: Options) -> Iterator[Row]:
    """c_skip x + c_out x0, noised to the next level. Luo et al. 2023, algorithm 3; boundary condition eq. 9.

    c_skip = d^2 / (u^2 + d^2), c_out = u / sqrt(u^2 + d^2), u = timestep_scaling * t, d = 0.5.
    """
    for t, (s, s_next) in zip(grid.t, pairwise(grid.levels), strict=True):
        a_next, b_next = variance_preserving(s_next)
        u = o.timestep_scaling * t
        denoised = (SIGMA_DATA**2 * x / np.hypot(u, SIGMA_DATA) + u * (m0 + clipped)) / np.hypot(u, SIGMA_DATA)
        yield Row(t, s, a_next * denoised + b_next * noise)


def tcd(grid: Grid, o: Options) -> Iterator[Row]:
    """DDIM to timestep (1 - eta) t', then noise up to t'. Zheng et al. 2024, algorithm 4, eta there gamma.

    The last step goes to timestep 0.
    """
    for i, t in enumerate(grid.t):
        s, t_next = grid.levels[i], grid.t[i + 1] if i + 1 < len(grid) else 0.0
        t_down = np.floor(np.float32(1 - o.eta) * np.float32(t_next))  # in float32, where diffusers floors it
        (a, b), (a_next, _), (a_down, b_down) = (
            variance_preserving(level) for level in (s, *grid.schedule.levels[[int(t_next), int(t_down)]])
        )
        down = a_down * m0 + b_down * (x - a * m0) / b
        keep = a_next / a_down
        yield Row(t, s, keep * down + np.sqrt(1 - keep**2) * noise)
