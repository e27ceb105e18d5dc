"""Where a sampler evaluates the model: timesteps and noise levels. NumPy, float64.

Grids of `n` steps are laid out by the scheduler's options, or from the timesteps `given`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from sdjax.sampling.schedule import LEVEL_SPACINGS, Array, NoiseSchedule, spaced_timesteps

CUT = 1e-4
"""Taken off a timestep before its fraction is cut: the last timestep becomes the one before, as diffusers' float32
logarithm makes it on Stable Diffusion's noise schedule."""

Options = SimpleNamespace
"""A scheduler's configuration, one attribute per option."""


@dataclass(frozen=True)
class Grid:
    """Timesteps `t` [n] and noise `levels` [n + 1], the last of them the level the run ends at.

    Both descend, or ascend in an inversion, whose t are those of the levels that its steps end at.

    `begin` steps were cut off at the start (image to image). `requested` is the num_inference_steps asked for.
    """

    schedule: NoiseSchedule
    t: Array
    levels: Array
    requested: int
    begin: int = 0

    def __len__(self) -> int:
        return len(self.t)

    @property
    def total(self) -> int:
        """Steps of the uncut grid."""
        return self.begin + len(self)

    @property
    def is_ascending(self) -> bool:
        return bool(self.levels[-1] > self.levels[0])

    def cleanest(self, n: int) -> "Grid":
        """The `n` steps of the least noise: the last ones, of an inversion the first."""
        if self.is_ascending:
            return Grid(self.schedule, self.t[:n], self.levels[: n + 1], self.requested)
        begin = len(self) - n
        return Grid(self.schedule, self.t[begin:], self.levels[begin:], self.requested, begin)


def respaced(o: Options) -> str | None:
    """Which of the options that replace the noise levels is on."""
    return next((name for name in LEVEL_SPACINGS if getattr(o, name, False)), None)


def _respace(name: str, o: Options, low: float, high: float, n: int) -> Array:
    """`n` levels from `high` (or the option sigma_max) down to `low` (or sigma_min)."""
    given = getattr(o, "sigma_min", None), getattr(o, "sigma_max", None)
    low, high = (end if value is None else value for value, end in zip(given, (low, high), strict=True))
    return LEVEL_SPACINGS[name](low, high, n)


def descending(name: str, values: Iterable[float], least: float, most: float) -> Array:
    """The numbers. Raises ValueError, which begins with the name, unless they descend between these limits."""
    try:
        found = np.array(list(values), np.float64)
    except (OverflowError, TypeError, ValueError):
        found = np.empty(0)
    if found.ndim != 1 or not found.size or not (np.diff(found) < 0).all():
        raise ValueError(f"{name} must be descending numbers, not {values!r}")
    if not (least <= found[-1] and found[0] <= most):
        raise ValueError(f"{name} must be from {least:g} to {most:g}, not {found[0]:g} to {found[-1]:g}")
    return found


def training_grid(schedule: NoiseSchedule, o: Options, n: int, given: Array | None = None) -> Grid:
    """Whole training timesteps: DDPM, DDIM, PNDM."""
    if given is not None:
        return _training_grid(schedule, o, given)
    t = spaced_timesteps(o.timestep_spacing, n, len(schedule), o.steps_offset, len(schedule), skip_zero=False).round()
    if t[0] >= len(schedule):
        raise ValueError(
            f"steps_offset={o.steps_offset} moves the first of {n} steps to timestep {t[0]:g}, past the last, "
            f"{len(schedule) - 1}; use fewer steps or steps_offset=0"
        )
    return _training_grid(schedule, o, t)


def ascending_grid(schedule: NoiseSchedule, o: Options, n: int) -> Grid:
    """The timesteps of `training_grid` from the lowest up, beginning at the level before them: inversion."""
    t = training_grid(schedule, o, n).t[::-1]
    first = level_before(schedule, o, t[0] - len(schedule) // n)
    return Grid(schedule, t, np.append(first, schedule.levels[t.astype(int)]), n)


def _training_grid(schedule: NoiseSchedule, o: Options, t: Array) -> Grid:
    """Ends at level 0 or, where DDIM's options say so, at that of the step that follows the last timestep."""
    end = level_before(schedule, o, t[-1] - len(schedule) // len(t)) if hasattr(o, "set_alpha_to_one") else 0.0
    return _at(schedule, t, end)


def _at(schedule: NoiseSchedule, t: Array, end: float) -> Grid:
    """At these timesteps, ending at a level."""
    return Grid(schedule, t, np.append(schedule.levels[t.astype(int)], end), len(t))


def level_before(schedule: NoiseSchedule, o: Options, t: float) -> float:
    """The level at timestep t; below 0 it is that of alpha = 1 (set_alpha_to_one) or of timestep 0."""
    if t >= 0:
        return schedule.levels[int(t)]
    return 0.0 if o.set_alpha_to_one else schedule.levels[0]


def distilled_grid(
    schedule: NoiseSchedule, o: Options, n: int, given: Array | None = None, *, ends_clean: bool
) -> Grid:
    """`n` of the `original_inference_steps` timesteps that LCM and TCD are distilled on.

    Ends at level 0 (ends_clean) or at timestep 0.
    """
    end = 0.0 if ends_clean else schedule.levels[0]
    if given is not None:
        return _at(schedule, given, end)
    return _at(schedule, distilled_timesteps(len(schedule), o.original_inference_steps, n), end)


def distilled_timesteps(training: int, original: int, n: int, strength: float = 1.0) -> Array:
    """`n` of the first int(original * strength) of the `original` timesteps that were distilled, descending."""
    if original > training:
        raise ValueError(f"original_inference_steps={original} must not exceed num_train_timesteps={training}")
    kept = int(original * strength)
    if n > kept:
        shown = f"original_inference_steps={original}" + f" times strength={strength:g}" * (strength < 1)
        raise ValueError(f"num_inference_steps={n} must not exceed {shown}")
    distilled = np.arange(kept, 0, -1) * (training // original) - 1
    return distilled[np.linspace(0, kept, n, endpoint=False).astype(int)].astype(float)


def exploding_grid(
    schedule: NoiseSchedule, o: Options, n: int, given: Array | None = None, *, round_karras: bool = False
) -> Grid:
    """Fractional timesteps, ending at level 0 or the smallest: the samplers of Karras et al. 2022."""
    schedule = schedule.with_finite_levels()
    t = given
    if given is None:
        t = spaced_timesteps(o.timestep_spacing, n, len(schedule), o.steps_offset, len(schedule), skip_zero=False)
    levels = schedule.level_at(t)
    log_linear = getattr(o, "interpolation_type", "linear") == "log_linear"
    if log_linear:  # n + 1 levels: the run ends at the smallest
        levels = LEVEL_SPACINGS["use_exponential_sigmas"](schedule.levels[0], schedule.levels[-1], n + 1)
    if option := respaced(o):
        levels = _respace(option, o, levels[-1], levels[0], n)
        t = schedule.timestep_at(levels)
        t = t.round() if round_karras and option == "use_karras_sigmas" else t
    final = schedule.levels[0] if getattr(o, "final_sigmas_type", "zero") == "sigma_min" else 0.0
    levels = np.append(levels, final)[: n + 1]
    return Grid(schedule, 0.25 * np.log(levels[:-1]) if is_continuous(o) else t, levels, n)


def is_continuous(o: Options) -> bool:
    """Whether a model is given a quarter of the logarithm of the level for a timestep."""
    return getattr(o, "timestep_type", "discrete") == "continuous" and o.prediction_type == "v_prediction"


def level_grid(schedule: NoiseSchedule, o: Options, levels: Array) -> Grid:
    """These levels, the last of them the one that the run ends at: sigmas of Euler's sampler."""
    schedule = schedule.with_finite_levels()
    t = 0.25 * np.log(levels[:-1]) if is_continuous(o) else schedule.timestep_at(levels[:-1])
    return Grid(schedule, t, levels, len(t))


def preserving_grid(
    schedule: NoiseSchedule,
    o: Options,
    n: int,
    given: Array | None = None,
    *,
    unrounded: str | None = None,
    repeat_last: bool = False,
) -> Grid:
    """Whole timesteps that leave the final one out: DPM-Solver, DEIS, UniPC.

    The timesteps of Karras and Lu levels are rounded, unless the beta schedule is `unrounded`; others are cut off. A
    run over replaced levels that does not go to 0 ends at the smallest of the schedule or, `repeat_last`, of its own.
    """
    schedule = schedule.with_finite_levels()
    spacing, offset = getattr(o, "timestep_spacing", "linspace"), getattr(o, "steps_offset", 0)
    clipped = np.sum(-np.log(schedule.levels) < getattr(o, "lambda_min_clipped", -np.inf))
    t = given
    if given is None:
        t = spaced_timesteps(spacing, n, len(schedule), offset, len(schedule) - clipped, skip_zero=True).round()
    levels, smallest = schedule.level_at(t), schedule.levels[0]
    if option := respaced(o):
        levels = _respace(option, o, schedule.levels[0], schedule.levels[-1], n)
        t, smallest = schedule.timestep_at(levels), levels[-1] if repeat_last else smallest
        rounded = option in ("use_karras_sigmas", "use_lu_lambdas") and o.beta_schedule != unrounded
        t = t.round() if rounded else np.floor(np.maximum(t - CUT, 0))
    final = 0.0 if getattr(o, "final_sigmas_type", "sigma_min") == "zero" else smallest
    return Grid(schedule, t, np.append(levels, final), n)
