"""Samplers on the training timesteps: DDPM, DDIM, PNDM."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from sdjax.sampling.grid import Grid, Options
from sdjax.sampling.schedule import Array, variance_preserving
from sdjax.sampling.table import Row, anchor, convert, m0, m1, m2, m3, noise, x


def ddpm(grid: Grid, o: Options) -> Iterator[Row]:
    """The mean of q(x' | x, x0) plus noise. Rows remember x0. Ho et al. 2020, eq. 6 and 7.

    variance_type: "fixed_small" (or "fixed_small_log") is the posterior's variance, "fixed_large" is beta.
    """
    for t, (s, s_next) in zip(grid.t, pairwise(grid.levels), strict=True):
        (a, b), (a_next, b_next) = variance_preserving(s), variance_preserving(s_next)
        beta = 1 - (a / a_next) ** 2
        variance = beta if o.variance_type == "fixed_large" else beta * (b_next / b) ** 2
        mean = a_next * beta / b**2 * m0 + a / a_next * (b_next / b) ** 2 * x
        yield t, s, mean + (np.sqrt(variance) * noise if t > 0 else 0), anchor


def ddim(grid: Grid, o: Options) -> Iterator[Row]:
    """x' = alpha' x0 + sqrt(sigma'^2 - std^2) epsilon + std * noise. Rows remember x0. Song et al. 2020, eq. 12 and 16.

    std = eta * (the posterior's deviation): eta 0 is deterministic, eta 1 is DDPM. Steps span num_train_timesteps //
    num_inference_steps timesteps, whatever the spacing.
    """
    for t, s in zip(grid.t, grid.levels[:-1], strict=True):
        s_next = _level_before(grid, o, t - len(grid.schedule) // grid.requested)
        (a, b), (a_next, b_next) = variance_preserving(s), variance_preserving(s_next)
        std = o.eta * b_next / b * np.sqrt(1 - (a / a_next) ** 2)
        epsilon = (x - a * m0) / b
        yield t, s, a_next * m0 + np.sqrt(b_next**2 - std**2) * epsilon + std * noise, anchor


def pndm(grid: Grid, o: Options) -> Iterator[Row]:
    """DDIM's step with epsilon extrapolated from the last four outputs. Liu et al. 2022, eq. 9 and 12 (PLMS).

    Rows remember the prediction itself (epsilon where the model predicts x0). The first step is taken twice, the second
    time with the mean of the outputs at both ends: n + 1 rows. The second output is then forgotten, so the first, five
    rows back when last used, moves to the anchor.
    """
    stride = len(grid.schedule) // grid.requested
    extrapolated = [
        (3 * m0 - anchor) / 2,
        (23 * m0 - 16 * m1 + 5 * anchor) / 12,
        (55 * m0 - 59 * m1 + 37 * m2 - 9 * anchor) / 24,
        (55 * m0 - 59 * m1 + 37 * m2 - 9 * m3) / 24,
    ]

    def step(start: Array, output: Array, t: float) -> Array:
        """DDIM from timestep t to t - stride; `output` is taken to be the prediction at `start`."""
        (a, b), (a_next, b_next) = (variance_preserving(_level_before(grid, o, u)) for u in (t, t - stride))
        of_x, of_output = convert(pndm_memory(o), "epsilon", a, b)
        epsilon = of_x * start + of_output * output
        return a_next / a * (start - b * epsilon) + b_next * epsilon

    yield grid.t[0], grid.levels[0], step(x, m0, grid.t[0]), x
    if len(grid) > 1:
        yield grid.t[1], grid.levels[1], step(anchor, (m0 + m1) / 2, grid.t[1] + stride), m1
    for i in range(1, len(grid)):
        yield grid.t[i], grid.levels[i], step(x, extrapolated[min(i, 4) - 1], grid.t[i]), anchor


def pndm_memory(o: Options) -> str:
    return "epsilon" if o.prediction_type == "sample" else o.prediction_type


def _level_before(grid: Grid, o: Options, t: float) -> float:
    """Noise level at timestep t; below 0 it is that of alpha = 1 (set_alpha_to_one) or of timestep 0."""
    if t >= 0:
        return grid.schedule.levels[int(t)]
    return 0.0 if o.set_alpha_to_one else grid.schedule.levels[0]
