"""A sampler on a model's noise schedule: it makes tables."""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sdjax.sampling.classes import CLASSES, Sampler
from sdjax.sampling.grid import Grid, Options, descending, is_continuous, level_grid, respaced
from sdjax.sampling.schedule import Array, NoiseSchedule
from sdjax.sampling.table import EVERYWHERE, Row, Table, assemble

HIGHEST_LEVEL = 1e6  # with zero terminal SNR it is 4096


@dataclass(frozen=True, eq=False)
class Scheduler:
    """A sampler on a model's noise schedule. Made by `from_config`.

    `config` is the complete configuration, as diffusers writes it to scheduler_config.json, but for options that are
    infinite by default, such as lambda_min_clipped, which JSON has no number for. The options that were left to the
    class's defaults are listed in `_use_default_values`.
    """

    config: Mapping[str, Any]
    sampler: Sampler = field(repr=False)
    options: Options = field(repr=False)
    schedule: NoiseSchedule = field(repr=False)

    def table(
        self,
        num_inference_steps: int = 50,
        strength: float = 1.0,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        denoising_start: float = 0.0,
        denoising_end: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        cfg_plus_plus: bool = False,
    ) -> Table:
        """The table of a run of `num_inference_steps` steps, or of its last int(num_inference_steps * strength).

        An inversion, which adds noise, has the first of them in place of the last: it ends where such a run begins.

        Args:
            num_inference_steps: 1 .. num_train_timesteps.
            strength: 0 < strength <= 1; below 1 the table starts in the middle of the noise (image to image), without
                outputs to remember.
            timesteps, sigmas: in place of num_inference_steps and of the scheduler's spacing, as in PyTorch diffusers'
                `set_timesteps`: the timestep of every step, descending, or the noise levels, the last of them (0, as a
                rule) where the run ends. Only of samplers whose class there takes them.
            denoising_start, denoising_end: the part of the noise to remove, as fractions of the training timesteps:
                what one model leaves at denoising_end another goes on with at the same denoising_start, as the base
                and the refiner of SDXL do (arXiv:2307.01952, section 2.5). Runs stop after whole steps.
            guidance_interval: the lowest and the highest noise level (sigma / alpha) at which there is guidance
                (arXiv:2404.07724); None: all.
            cfg_plus_plus: see `table.cfg_plus_plus`.

        Raises:
            ValueError: an argument is out of range, or the steps are too many for the sampler, or none is left, or
                the sampler has no CFG++.
        """
        if not 0 < strength <= 1:
            raise ValueError(f"strength={strength} must be in (0, 1]")
        if not 0 <= denoising_start < denoising_end <= 1:
            raise ValueError(
                f"denoising_start={denoising_start} must be below denoising_end={denoising_end}, both in 0 .. 1"
            )
        given = {"timesteps": timesteps, "sigmas": sigmas}
        given = {name: values for name, values in given.items() if values is not None}
        grid = self._given_grid(given) if given else self._spaced_grid(operator.index(num_inference_steps))
        n = grid.requested
        first, last = (self._timestep_after(part) for part in (denoising_start, denoising_end))
        kept = len(grid) - n + min(int(n * strength), n)
        kept = min(kept, int(np.sum(grid.t < first))) if denoising_start else kept
        if kept < 1:
            raise ValueError(
                f"strength={strength}, denoising_start={denoising_start} leaves none of {n} steps; take more steps"
            )
        rest = grid.cleanest(kept)
        if grid.is_ascending and denoising_end < 1:
            raise ValueError(f"denoising_end={denoising_end}: an inversion has none; give strength or denoising_start")
        done = int(np.sum(rest.t >= last)) if denoising_end < 1 else kept
        if done < 1:
            raise ValueError(f"denoising_end={denoising_end} leaves none of {n} steps; take more steps")
        rows = self._rows(rest)
        ends = [place for place, row in enumerate(rows) if row.is_sample]
        return assemble(
            rows[: ends[done - 1] + 1],
            self.options.prediction_type,
            self.sampler.memory(self.options),
            end=rest.levels[done],
            variance_exploding=self.sampler.variance_exploding,
            init_noise_sigma=self._init_noise_sigma(grid.levels),
            **_limits(self.options),
            guidance_interval=EVERYWHERE if guidance_interval is None else _interval(guidance_interval),
            is_cfg_plus_plus=cfg_plus_plus,
            first_draw=len(self._rows(grid)) - len(rows) if kept < len(grid) else 0,
        )

    def _spaced_grid(self, n: int) -> Grid:
        if not 1 <= n <= len(self.schedule):
            raise ValueError(f"num_inference_steps={n} must be in 1 .. num_train_timesteps={len(self.schedule)}")
        return self.sampler.grid(self.schedule, self.options, n)

    def _given_grid(self, given: Mapping[str, Sequence[float]]) -> Grid:
        """The grid of timesteps or sigmas that are given in place of a number of steps."""
        if len(given) > 1:
            raise ValueError("timesteps and sigmas: give one of them")
        [(name, values)] = given.items()
        if name not in self.sampler.takes:
            able = ", ".join(known for known, sampler in CLASSES.items() if name in sampler.takes)
            raise ValueError(f"{name}: {self.config['_class_name']} does not take them; these do: {able}")
        if name == "sigmas":
            levels = descending(name, values, 0, HIGHEST_LEVEL)
            if len(levels) < 2:
                raise ValueError(f"sigmas needs two or more, the last of them where the run ends, not {values!r}")
            return level_grid(self.schedule, self.options, levels)
        option = respaced(self.options) or ("timestep_type" if is_continuous(self.options) else None)
        if option:
            raise ValueError(f"timesteps: not with {option}={getattr(self.options, option)!r}, which has its own")
        t = descending(name, values, 0, len(self.schedule) - 1)
        if not self.sampler.variance_exploding and (t != t.round()).any():
            raise ValueError(f"timesteps of {self.config['_class_name']} must be whole numbers, not {values!r}")
        return self.sampler.grid(self.schedule, self.options, len(t), t)

    def _rows(self, grid: Grid) -> list[Row]:
        with np.errstate(divide="ignore", invalid="ignore"):  # `assemble` raises for what is not finite
            return list(self.sampler.rows(grid, self.options))

    def _timestep_after(self, part: float) -> int:
        """The timestep below which are those that are left when this part of the noise is removed."""
        return round(len(self.schedule) - part * len(self.schedule))

    def timesteps(self, num_inference_steps: int) -> Array:
        """The timestep of every model evaluation: diffusers' `timesteps` after `set_timesteps`. [R]"""
        return self.table(num_inference_steps).t

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the initial latents for a run over all training timesteps.

        `Table.init_noise_sigma` is that of a certain number of steps, as diffusers has it after `set_timesteps`.
        """
        return self._init_noise_sigma(self.schedule.with_finite_levels().levels)

    def _init_noise_sigma(self, levels: Array) -> float:
        if not self.sampler.variance_exploding:
            return 1.0
        peak = float(levels.max())
        return float(np.hypot(peak, 1)) if self.options.timestep_spacing == "leading" else peak


def _limits(o: Options) -> dict[str, Any]:
    """What `assemble` takes of clipping and thresholding. UniPC thresholds x0 alone, as in diffusers."""
    if getattr(o, "thresholding", False) and getattr(o, "predict_x0", True):
        uses_clipped = hasattr(o, "clip_sample")
        return {"clip": o.sample_max_value, "quantile": o.dynamic_thresholding_ratio, "uses_clipped": uses_clipped}
    return {"clip": o.clip_sample_range if getattr(o, "clip_sample", False) else math.inf}


def _interval(levels: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = map(float, levels)
    except (TypeError, ValueError):
        low, high = np.nan, np.nan
    if not 0 <= low < high:
        raise ValueError(f"guidance_interval must be two noise levels, 0 <= low < high, not {levels!r}")
    return low, high
