"""A sampler as a table of coefficients, one row per model evaluation. NumPy, float64."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdjax.sampling.schedule import Array, variance_preserving

x, anchor, m0, m1, m2, m3, noise, clipped = np.eye(8)
"""What a new state may be a combination of: the state, the second state slot, the model's output of this row and of the
three rows before, a standard normal draw, and what clipping adds to this row's estimate of the clean image."""

EVERYWHERE = (0.0, math.inf)
ROWLESS = ("init_noise_sigma",)
"""The fields of a table that have no row axis"""


class Row(NamedTuple):
    """An evaluation of the model and the update that follows."""

    t: float
    level: float
    """the noise level of x before the update"""
    x: Array
    """the new x"""
    anchor: Array = anchor
    """the new anchor"""
    is_sample: bool = True
    """whether the new x is where a step ends; otherwise the next row needs more than x"""
    keep: bool = True
    """whether the rows after remember this row's output"""


@dataclass(frozen=True)
class Table:
    """Coefficients of a sampling run with R model evaluations f(x, t).

    m = skip * x + out * f(cin * x, t);  (x, anchor) <- mix @ (x, anchor, m0, m1, m2, m3, noise, clipped)

    where m0 is this row's m, m1, m2 and m3 those of the last rows whose `keep` is 1, not 0, and noise a standard normal
    draw. Both states start as `init_noise_sigma` times a standard normal draw, and x after the last row is the sample.
    `denoised` gives each row's estimate of the clean image, denoised[0] * x + denoised[1] * m0, with x as before the
    update; clipped is what must be added to it so that no value is above `clip`, or below -clip; `clip` is infinite
    where the sampler does not clip. `guidance` is how many times the guidance of a row counts: 1, or 0 in rows that are
    to be without classifier-free guidance, or what `cfg_plus_plus` gives.
    `draw` numbers the rows' noise: the row's place in the run over all of the noise, also where the table is a part of
    that. `marginals` is what x is before each row and after the last: marginals[0] * clean + marginals[1] * noise, the
    noise standard normal.
    `threshold` is (q, r) of each row: where q > 0, clipped is what makes the estimate clip(estimate, -s, s) / s, with s
    the q-quantile of its absolute values, from 1 to `clip` (dynamic thresholding, arXiv:2205.11487, section 2.3), and
    m0 has r * clipped added. It is None where no image of a stack has it.

    Fields are float64, `draw` int64: `mix` [R, 2, 8], `denoised` and `threshold` [R, 2], `marginals` [R + 1, 2],
    `init_noise_sigma` a scalar, the others [R]. In a stack of I tables the image axis follows the row axis: [R, I],
    [R, I, 2, 8], … and [I].
    """

    t: Array
    cin: Array
    skip: Array
    out: Array
    mix: Array
    denoised: Array
    clip: Array
    keep: Array
    guidance: Array
    draw: NDArray[np.int64]
    marginals: Array
    init_noise_sigma: Array
    threshold: Array | None = None

    def __len__(self) -> int:
        """The number of rows: model evaluations, not steps."""
        return len(self.t)

    @property
    def adds_noise(self) -> NDArray[np.bool_]:
        """[R], in a stack [R, I]: whether a row adds noise."""
        return (self.mix @ noise).any(axis=-1)

    @classmethod
    def stack(cls, tables: Sequence["Table"]) -> "Table":
        """Tables of several images side by side, the shorter ones padded at their end with rows that do nothing.

        Raises:
            ValueError: no tables.
        """
        if not tables:
            raise ValueError("Table.stack needs at least one table")
        rows = max(map(len, tables))
        if any(table.threshold is not None for table in tables):
            tables = [table._with_threshold() for table in tables]
        padded = [table._pad(rows) for table in tables]
        stacked = {
            field.name: np.stack([getattr(table, field.name) for table in padded], axis=int(field.name not in ROWLESS))
            for field in fields(cls)
            if getattr(padded[0], field.name) is not None
        }
        return cls(**stacked)

    def _with_threshold(self) -> "Table":
        return self if self.threshold is not None else replace(self, threshold=np.zeros((len(self), 2)))

    def _pad(self, rows: int) -> "Table":
        idle = Table.idle(rows - len(self), self.marginals[-1])
        added = {
            field.name: np.concatenate([getattr(self, field.name), getattr(idle, field.name)])
            for field in fields(self)
            if field.name not in ROWLESS and getattr(self, field.name) is not None
        }
        return replace(self, **added)

    @classmethod
    def idle(cls, rows: int, marginals: Sequence[float] = (1.0, 0.0)) -> "Table":
        """Rows that leave the state as it is, at these `marginals`; whose own are then one fewer."""
        zeros = np.zeros(rows)
        return cls(
            t=zeros,
            cin=zeros,
            skip=zeros,
            out=zeros,
            mix=np.tile([x, anchor], (rows, 1, 1)),
            denoised=np.tile([1.0, 0.0], (rows, 1)),
            clip=np.full(rows, np.inf),
            keep=zeros,
            guidance=zeros,
            draw=np.zeros(rows, np.int64),
            marginals=np.tile(marginals, (rows, 1)),
            init_noise_sigma=np.float64(1),
            threshold=np.zeros((rows, 2)),
        )


def convert(source: str, target: str, alpha: Array, sigma: Array) -> tuple[Array, Array]:
    """Coefficients (k, l) with target = k * x + l * source, where x = alpha * x0 + sigma * epsilon.

    Both are among "epsilon", "sample" (x0) and "v_prediction" (alpha * epsilon - sigma * x0; Salimans and Ho 2022,
    appendix D). A coefficient is infinite where `source` does not determine `target`.
    """
    zero, one = np.zeros_like(alpha), np.ones_like(alpha)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            ("epsilon", "sample"): (1 / alpha, -sigma / alpha),
            ("v_prediction", "sample"): (alpha, -sigma),
            ("sample", "epsilon"): (1 / sigma, -alpha / sigma),
            ("v_prediction", "epsilon"): (sigma, alpha),
        }.get((source, target), (zero, one))


def assemble(
    rows: Iterable[Row],
    prediction: str,
    remember: str,
    *,
    end: float,
    variance_exploding: bool = False,
    init_noise_sigma: float = 1.0,
    clip: float = math.inf,
    quantile: float | None = None,
    uses_clipped: bool = True,
    guidance_interval: tuple[float, float] = EVERYWHERE,
    is_cfg_plus_plus: bool = False,
    first_draw: int = 0,
) -> Table:
    """The table of a sampler's rows.

    Args:
        rows: the sampler's update on unit vectors.
        prediction: what the model predicts: "epsilon", "sample" or "v_prediction".
        remember: what the rows take m to be, of the same three.
        end: the noise level of x after the last row.
        variance_exploding: x counts as x0 + level * epsilon, and the model sees x / sqrt(1 + level^2).
        init_noise_sigma: standard deviation of the initial x.
        clip: the largest value of a clean image.
        quantile: of dynamic thresholding; None: there is none.
        uses_clipped: whether the rows use `clipped`; else what they remember is m of the thresholded image.
        guidance_interval: the lowest and the highest noise level with guidance.
        is_cfg_plus_plus: whether guidance counts `cfg_plus_plus` times.
        first_draw: the draw number of the first row.

    Raises:
        ValueError: a coefficient is not finite.
    """
    t, level, new_x, new_anchor, _, keep = (np.array(column, np.float64) for column in zip(*rows, strict=True))
    alpha, sigma = variance_preserving(level)
    cin = alpha if variance_exploding else np.ones_like(alpha)
    skip, out = convert(prediction, remember, alpha, sigma)
    denoised = convert(remember, "sample", alpha, sigma)
    levels = np.append(level, end)
    marginals = (np.ones_like(levels), levels) if variance_exploding else variance_preserving(levels)
    table = Table(
        t=t,
        cin=cin,
        skip=skip * cin,
        out=out,
        mix=np.stack([new_x, new_anchor], axis=1),
        denoised=np.stack([denoised[0] * cin, denoised[1]], axis=1),
        clip=np.full(len(t), clip),
        keep=keep,
        guidance=((guidance_interval[0] <= level) & (level <= guidance_interval[1])).astype(np.float64),
        draw=first_draw + np.arange(len(t)),
        marginals=np.stack(marginals, axis=1),
        init_noise_sigma=np.float64(init_noise_sigma),
    )
    if quantile is not None:
        added = 0 * t if uses_clipped else convert("sample", remember, alpha, sigma)[1]
        table = replace(table, threshold=np.stack([np.full(len(t), quantile), added], axis=1))
    if is_cfg_plus_plus:
        table = replace(table, guidance=table.guidance * cfg_plus_plus(table))
    columns = [table.skip, table.out, table.guidance, table.denoised, table.mix.reshape(len(t), -1)]
    finite = np.isfinite(np.column_stack(columns)).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"no finite update at timestep {t[~finite][0]:g}: either the steps are so many that two share a level, or "
            f"{prediction!r} does not determine the image there (zero terminal SNR needs 'v_prediction' or 'sample')"
        )
    return table


def cfg_plus_plus(table: Table) -> Array:
    """How many times the guidance of each row must count to be that of CFG++ (Chung et al. 2024, arXiv:2406.08070). [R]

    x' = A x0 + B epsilon with x0 of the guided prediction and epsilon of the unconditional one (algorithm 2). Where
    x = alpha x0 + sigma epsilon, x0 = d0 x + d1 m and a row is x' = p x + q m, this is the row's own update with
    1 + alpha (p d1 / q - d0) times the guidance: level / (level - level') for DDIM and Euler.

    Raises ValueError for a sampler that remembers more than x or clips.
    """
    p, q, d0, d1 = table.mix[:, 0] @ x, table.mix[:, 0] @ m0, *table.denoised.T
    if (table.mix[:, 0] @ (anchor + m1 + m2 + m3)).any() or np.isfinite(table.clip).any():
        raise ValueError(
            "cfg_plus_plus: only with samplers of first order, such as ddim, euler and euler_ancestral, "
            "and without clip_sample"
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1 + table.marginals[:-1, 0] * (p * d1 / q - d0)
