"""DEIS: Zhang and Chen 2022, "Fast Sampling of Diffusion Models with Exponential Integrator". Rows remember epsilon."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from sdjax.sampling.dpm_solver import SHORT_RUN
from sdjax.sampling.grid import Grid, Options
from sdjax.sampling.k_diffusion import lagrange
from sdjax.sampling.schedule import variance_preserving
from sdjax.sampling.table import Row, m0, m1, m2, x


def deis(grid: Grid, o: Options) -> Iterator[Row]:
    """x' / alpha' = x / alpha + sum_j m_j * integral over rho = s .. s' of the j-th Lagrange polynomial in log rho.

    Eq. 14 and 15, log-rho variant, rho = sigma / alpha. lower_order_final lowers the order to 1 at the end of runs of
    fewer than 15 steps.
    """
    for i, (s, s_next) in enumerate(pairwise(grid.levels)):
        order = min(o.solver_order, i + 1)
        if o.lower_order_final and grid.total < SHORT_RUN:
            order = min(order, len(grid) - i)
        past = np.log(grid.levels[i - order + 1 : i + 1][::-1] / s)
        weights = (s * integral_times_exp(lagrange(past, j), np.log(s_next / s)) for j in range(order))
        a, a_next = variance_preserving(s)[0], variance_preserving(s_next)[0]
        change = sum(w * m for w, m in zip(weights, (m0, m1, m2), strict=False))
        yield Row(grid.t[i], s, a_next * (x / a + change))


def integral_times_exp(p: np.poly1d, end: float) -> float:
    """Integral of p(u) e^u over 0 .. end, by parts: e^u (p - p' + p'' - ...)."""
    primitive = sum(((-1) ** k * p.deriv(k) for k in range(1, p.order + 1)), p)
    return np.exp(end) * primitive(end) - primitive(0)
