"""Samplers on the training timesteps: DDPM, DDIM and its inversion, PNDM."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from sdjax.sampling.grid import Grid, Options, level_before
from sdjax.sampling.schedule import Array, variance_preserving
from sdjax.sampling.table import Row, anchor, clipped, convert, m0, m1, m2, m3, noise, x


def ddpm(grid: Grid, o: Options) -> Iterator[Row]:
    """The mean of q(x' | x, x0) plus noise. Rows remember x0. Ho et al. 2020, eq. 6 and 7.

    variance_type: "fixed_small" (or "fixed_small_log") is the posterior's variance, "fixed_large" is beta.
    """
    for t, (s, s_next) in zip(grid.t, pairwise(grid.levels), strict=True):
        (a, b), (a_next, b_next) = variance_preserving(s), variance_preserving(s_next)
        beta = 1 - (a / a_next) ** 2
        variance = beta if o.variance_type == "fixed_large" else beta * (b_next / b) ** 2
        mean = a_next * beta / b**2 * (m0 + clipped) + a / a_next * (b_next / b) ** 2 * x
        yield Row(t, s, mean + (np.sqrt(variance) * noise if t > 0 else 0))


def ddim(grid: Grid, o: Options) -> Iterator[Row]:
    """x' = alpha' x0 + sqrt(sigma'^2 - std^2) epsilon + std * noise. Rows remember x0. Song et al. 2020, eq. 12 and 16.

    std = eta * (the posterior's deviation): eta 0 is deterministic, eta 1 is DDPM. Steps span num_train_timesteps //
    num_inference_steps timesteps, whatever the spacing. Epsilon is the model's also where x0 is clipped.
    """
    for t, s in zip(grid.t, grid.levels[:-1], strict=True):
        s_next = level_before(grid.schedule, o, t - _stride(grid))
        (a, b), (a_next, b_next) = variance_preserving(s), variance_preserving(s_next)
        std = o.eta * b_next / b * np.sqrt(1 - (a / a_next) ** 2)
        epsilon = (x - a * m0) / b
        yield Row(t, s, a_next * (m0 + clipped) + np.sqrt(b_next**2 - std**2) * epsilon + std * noise)


def ddim_inverse(grid: Grid, o: Options) -> Iterator[Row]:
    """x' = alpha' x0 + sigma' epsilon, DDIM's step up the noise: to the level of timestep t, from the one a step below.

    The model's prediction at (x, t) stands for that at (x', t). Rows remember epsilon, for the first has no noise. Song
    et al. 2020, section 4.3; Dhariwal and Nichol 2021, appendix F.
    """
    for t, s_next in zip(grid.t, grid.levels[1:], strict=True):
        s = level_before(grid.schedule, o, t - _stride(grid))
        (a, b), (a_next, b_next) = variance_preserving(s), variance_preserving(s_next)
        yield Row(t, s, a_next * ((x - b * m0) / a + clipped) + b_next * m0)


def pndm(grid: Grid, o: Options) -> Iterator[Row]:
    """DDIM's step with epsilon extrapolated from the last four outputs. Liu et al. 2022, eq. 9 and 12.

    Rows remember the prediction itself (epsilon where the model predicts x0). The first steps, for which there are too
    few outputs, are three of Runge-Kutta, or PLMS's (skip_prk_steps).
    """
    start = _plms_start if o.skip_prk_steps else _runge_kutta_start
    yield from start(grid, o)
    extrapolated = (55 * m0 - 59 * m1 + 37 * m2 - 9 * m3) / 24
    for i in range(4 if o.skip_prk_steps else 3, len(grid)):
        yield Row(grid.t[i], grid.levels[i], _step(grid, o, x, extrapolated, grid.t[i]))


def _plms_start(grid: Grid, o: Options) -> Iterator[Row]:
    """The first step is taken twice, the second time with the mean of the outputs at both ends; then orders 2 to 4.

    The second output is then forgotten, so the first, five rows back when last used, moves to the anchor.
    A run that stops after the first step has what it gives the first time, as in diffusers.
    """
    yield Row(grid.t[0], grid.levels[0], _step(grid, o, x, m0, grid.t[0]), x)
    if len(grid) > 1:
        again = _step(grid, o, anchor, (m0 + m1) / 2, grid.t[1] + _stride(grid))
        yield Row(grid.t[1], grid.levels[1], again, m1, is_sample=False)
    extrapolated = [
        (3 * m0 - anchor) / 2,
        (23 * m0 - 16 * m1 + 5 * anchor) / 12,
        (55 * m0 - 59 * m1 + 37 * m2 - 9 * anchor) / 24,
    ]
    for i, output in zip(range(1, len(grid)), extrapolated, strict=False):
        yield Row(grid.t[i], grid.levels[i], _step(grid, o, x, output, grid.t[i]))


def _runge_kutta_start(grid: Grid, o: Options) -> Iterator[Row]:
    """Three steps of four evaluations, k1 to k4, at the start, twice in the middle and at the end. Eq. 13.

    k1 alone is remembered. In the row of k3, k2 is found in x, which is a combination of it and the anchor.
    """
    if len(grid) < 4:
        raise ValueError(f"skip_prk_steps=False needs 4 steps or more, not {len(grid)}")
    half, zero = _stride(grid) // 2, 0 * x
    for s, t, end in zip(grid.levels[:3], grid.t[:3], grid.t[1:4], strict=True):
        middle = end + half
        s_middle, s_end = (grid.schedule.levels[int(u)] for u in (middle, end))
        k1, k2 = m1, (x - _step(grid, o, anchor, zero, t, middle)) / (_step(grid, o, zero, m0, t, middle) @ m0)
        yield Row(t, s, _step(grid, o, x, m0, t, t - half), x, is_sample=False)
        yield Row(middle, s_middle, _step(grid, o, anchor, m0, t, middle), is_sample=False, keep=False)
        without_k4 = _step(grid, o, anchor, (k1 + 2 * k2 + 2 * m0) / 6, t, end)
        yield Row(middle, s_middle, _step(grid, o, anchor, m0, t, end), without_k4, is_sample=False, keep=False)
        yield Row(end, s_end, anchor + _step(grid, o, zero, m0 / 6, t, end), keep=False)


def _stride(grid: Grid) -> int:
    return len(grid.schedule) // grid.requested


def _step(grid: Grid, o: Options, start: Array, output: Array, t: float, t_next: float | None = None) -> Array:
    """DDIM from timestep t to t_next, by default t - stride; `output` is taken to be the prediction at `start`."""
    t_next = t - _stride(grid) if t_next is None else t_next
    (a, b), (a_next, b_next) = (variance_preserving(level_before(grid.schedule, o, u)) for u in (t, t_next))
    of_x, of_output = convert(pndm_memory(o), "epsilon", a, b)
    epsilon = of_x * start + of_output * output
    return a_next / a * (start - b * epsilon) + b_next * epsilon


def pndm_memory(o: Options) -> str:
    return "epsilon" if o.prediction_type == "sample" else o.prediction_type
