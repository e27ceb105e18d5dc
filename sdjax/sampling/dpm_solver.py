"""DPM-Solver and DPM-Solver++, multistep and singlestep, deterministic and stochastic.

Exponential integrators in lambda = log(alpha / sigma): Lu et al. 2022 (DPM-Solver) on epsilon, Lu et al. 2022b
(DPM-Solver++) on x0. Rows remember what is integrated.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from sdjax.sampling.grid import Grid, Options
from sdjax.sampling.schedule import Array, variance_preserving
from sdjax.sampling.table import Row, anchor, m0, m1, m2, noise, x

SHORT_RUN = 15  # steps below which lower_order_final applies


def memory(o: Options) -> str:
    return "sample" if o.algorithm_type.endswith("++") else "epsilon"


@dataclass(frozen=True)
class Step:
    """x' = linear * x + gain[0] D0 + gain[1] D1 + gain[2] D2 + up * noise, D_k the k-th scaled difference of outputs.

    `midpoint` is the gain of D1 that replaces gain[1] in the midpoint variants of order 2.
    """

    linear: float
    gain: tuple[float, float, float]
    up: float

    @property
    def midpoint(self) -> float:
        return self.gain[0] / 2


def exponential_step(algorithm: str, s: float, s_next: float) -> Step:
    """From noise level s to s_next, h = log(s / s_next). DPM-Solver, appendix B; DPM-Solver++, appendix A.

    x0:       gain_k = alpha' (1 - e^-H), alpha' ((e^-H - 1) / H + 1), alpha' (1/2 - (e^-H - 1 + H) / H^2)
    epsilon:  gain_k = -sigma' (e^h - 1), -sigma' ((e^h - 1) / h - 1), -sigma' ((e^h - 1 - h) / h^2 - 1/2)

    H = h, or 2 h for the stochastic form; the stochastic form on epsilon doubles the gains. The constant of gain[2] has
    the other sign in the stochastic form, as in diffusers.
    """
    stochastic = algorithm.startswith("sde")
    (a, b), (a_next, b_next) = variance_preserving(s), variance_preserving(s_next)
    r = s_next / s  # e^-h, 0 on the way to level 0, where only gain[0] is finite
    with np.errstate(divide="ignore", invalid="ignore"):
        h = -np.log(r)
        if algorithm.endswith("++"):
            H = 2 * h if stochastic else h
            q = np.exp(-H)
            sign = -1 if stochastic else 1
            gain = 1 - q, (q - 1) / H + 1, sign / 2 - (q - 1 + H) / H**2
            up = b_next * np.sqrt(1 - r**2) if stochastic else 0.0
            return Step(b_next / b * (r if stochastic else 1), tuple(a_next * g for g in gain), up)
        scale = -b_next * (2 if stochastic else 1)
        gain = 1 / r - 1, (1 / r - 1) / h - 1, (1 / r - 1 - h) / h**2 - 1 / 2
        up = b_next * np.sqrt(1 / r**2 - 1) if stochastic else 0.0
        return Step(a_next / a, tuple(scale * g for g in gain), up)


def multistep(grid: Grid, o: Options) -> Iterator[Row]:
    """Differences over the outputs of the steps before. DPM-Solver++ algorithm 2; order 3: DPM-Solver, appendix B.3.

    Orders grow from 1 at the start. lower_order_final lowers them to 1 at the end of runs of fewer than 15 steps;
    euler_at_final, or an end at level 0, makes the last step first order in any run.
    """
    last_is_first_order = o.euler_at_final or o.final_sigmas_type == "zero"
    for i, (s, s_next) in enumerate(pairwise(grid.levels)):
        left = len(grid) - i
        order = min(o.solver_order, i + 1)
        if o.lower_order_final and grid.total < SHORT_RUN:
            order = min(order, left)
        if s_next == s or (left == 1 and last_is_first_order):
            order = 1
        update = exponential_step(o.algorithm_type, s, s_next)
        past = np.log(s / grid.levels[max(i - 2, 0) : i][::-1]) / np.log(s_next / s) if order > 1 else ()
        yield Row(grid.t[i], s, _multistep_update(update, order, o.solver_type, past))


def _multistep_update(step: Step, order: int, solver_type: str, past: Array) -> Array:
    """`past`: how many steps back, in h, lie the one and two outputs before."""
    new = step.linear * x + step.gain[0] * m0 + step.up * noise
    if order == 1:
        return new
    r0 = past[0]
    D1 = (m0 - m1) / r0
    if order == 2:
        return new + (step.midpoint if solver_type == "midpoint" else step.gain[1]) * D1
    r1 = past[1] - past[0]
    D1_before = (m1 - m2) / r1
    slope = (D1 - D1_before) / (r0 + r1)
    return new + step.gain[1] * (D1 + r0 * slope) + step.gain[2] * slope


def singlestep(grid: Grid, o: Options) -> Iterator[Row]:
    """Groups of 1, 2 or 3 evaluations, each from the state at its start (anchor). DPM-Solver, algorithms 1 and 2."""
    orders = _singlestep_orders(o, grid.total)[grid.begin :]
    for i, (s, s_next) in enumerate(pairwise(grid.levels)):
        order = min(orders[i], i + 1)
        start = grid.levels[i - order + 1]
        update = exponential_step(o.algorithm_type, start, s_next)
        passed = np.log(grid.levels[i - order + 2 : i + 1] / start) / np.log(s_next / start) if order > 1 else ()
        yield Row(grid.t[i], s, _singlestep_update(update, order, o.solver_type, passed), x if order == 1 else anchor)


def _singlestep_update(step: Step, order: int, solver_type: str, passed: Array) -> Array:
    """`passed`: where in the step, in h, lie the second and third outputs of the group."""
    start, D0 = (x, anchor, anchor)[order - 1], (m0, m1, m2)[order - 1]
    new = step.linear * start + step.gain[0] * D0 + step.up * noise
    if order == 1:
        return new
    r0 = passed[-1]
    D1 = (m0 - D0) / r0
    if order == 2:
        return new + (step.midpoint if solver_type == "midpoint" else step.gain[1]) * D1
    if solver_type == "midpoint":
        return new + step.gain[1] * D1
    r1 = passed[0]
    D1_middle = (m1 - D0) / r1
    slope = (D1 - D1_middle) / (r0 - r1)
    return new + step.gain[1] * (D1_middle - r1 * slope) + step.gain[2] * 2 * slope


def _singlestep_orders(o: Options, steps: int) -> list[int]:
    """Order of each evaluation. The run's last is 1 where it ends at level 0; groups left incomplete end lower."""
    k, to_zero = o.solver_order, o.final_sigmas_type == "zero"
    orders = [1 + i % k for i in range(steps)]
    lower_order_final = o.lower_order_final or to_zero or steps % k
    if k == 3 and lower_order_final and steps % 3 == 0:
        orders[-3:] = [1, 2, 1]
    if k == 2 and lower_order_final and steps % 2 == 0:
        orders[-2:] = [1, 1]
    if to_zero:
        orders[-1] = 1
    return orders
