"""UniPC: Zhao et al. 2023, "A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models"."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from sdjax.sampling.grid import Grid, Options
from sdjax.sampling.schedule import Array, variance_preserving
from sdjax.sampling.table import Row, anchor, m0, m1, m2, m3, x


def memory(o: Options) -> str:
    return "sample" if o.predict_x0 else "epsilon"


def unipc(grid: Grid, o: Options) -> Iterator[Row]:
    """Correct x with this row's output, then predict the next. Algorithms 1 and 2 (B2 and B1 variants), orders 1 to 3.

    Row i corrects the step from level i - 1, which started at the anchor, unless i - 1 is in `disable_corrector`; the
    corrected state becomes the anchor. A step to level 0, or of no length, is first order.
    """
    order = 0
    for i in range(len(grid)):
        corrects = i > 0 and grid.begin + i - 1 not in o.disable_corrector
        state = _update(o, grid.levels[: i + 1], anchor, (m1, m2, m3)[:order], ahead=m0) if corrects else x
        order = min(o.solver_order, i + 1)
        if o.lower_order_final:
            order = min(order, len(grid) - i)
        if not 0 < grid.levels[i + 1] < grid.levels[i]:
            order = 1
        yield Row(grid.t[i], grid.levels[i], _update(o, grid.levels[: i + 2], state, (m0, m1, m2)[:order]), state)


def _update(o: Options, levels: Array, start: Array, outputs: Sequence[Array], ahead: Array | None = None) -> Array:
    """From levels[-2] to levels[-1], by the outputs at levels[-2], levels[-3], … and, corrected, that at levels[-1].

    start' = (exact for a constant output) - scale * B(h) * sum_k weight_k (output_k - outputs[0]) / r_k. Eq. 3 and 8.
    """
    s, s_next = levels[-2:]
    (a, b), (a_next, b_next) = variance_preserving(s), variance_preserving(s_next)
    first, order = outputs[0], len(outputs)
    if o.predict_x0:
        new, scale = b_next / b * start + a_next * (1 - s_next / s) * first, a_next
    else:
        new, scale = a_next / a * start - a_next * (s - s_next) * first, b_next
    others = [*outputs[1:], ahead] if ahead is not None else outputs[1:]
    if not others:
        return new
    r = np.append(np.log(s / levels[-3 : -2 - order : -1]) / np.log(s / s_next), 1.0)[: len(others)]
    h = np.log(s_next / s) if o.predict_x0 else np.log(s / s_next)
    B = h if o.solver_type == "bh1" else np.expm1(h)
    slopes = sum(w * (m - first) / rk for w, m, rk in zip(_weights(r, h, B), others, r, strict=True))
    return new - scale * B * slopes


def _weights(r: Array, h: float, B: float) -> Array:
    """Solve sum_k r_k^(n-1) weight_k = n! h phi_(n+1)(h) / B for n = 1 .. len(r): eq. 5. A single one is 1/2."""
    if len(r) == 1:
        return np.array([0.5])
    powers = np.vander(r, increasing=True).T
    return np.linalg.solve(powers, [math.factorial(n) * h * _phi(n + 1, h) / B for n in range(1, len(r) + 1)])


def _phi(n: int, h: float) -> float:
    """phi_0 = e^h; phi_n = (phi_(n-1) - 1 / (n-1)!) / h."""
    return np.exp(h) if n == 0 else (_phi(n - 1, h) - 1 / math.factorial(n - 1)) / h
