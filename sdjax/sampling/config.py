"""From a diffusers scheduler configuration, or a sampler's name, to tables."""

import difflib
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

from sdjax.sampling import consistency, ddim, deis, dpm_solver, k_diffusion, unipc
from sdjax.sampling.grid import (
    Grid,
    Options,
    descending,
    distilled_grid,
    exploding_grid,
    is_continuous,
    level_grid,
    preserving_grid,
    respaced,
    training_grid,
)
from sdjax.sampling.schedule import BETA_SCHEDULES, LEVEL_SPACINGS, Array, NoiseSchedule
from sdjax.sampling.table import EVERYWHERE, Row, Table, assemble

STABLE_DIFFUSION = MappingProxyType(
    {
        "_class_name": "PNDMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
    }
)
"""The scheduler_config.json of Stable Diffusion 1.x."""

TRAINING = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
LATENT = TRAINING | {"beta_start": 0.00085, "beta_end": 0.012}
LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
RESPACED = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
ZERO_SNR = {"rescale_betas_zero_snr": False}
CLIP = {"clip_sample": False, "clip_sample_range": 1.0}  # diffusers' DDPM and DDIM clip unless they are told not to
SIGMA_RANGE = {"sigma_min": None, "sigma_max": None}
INFINITE = {"lambda_min_clipped": -np.inf}  # defaults that JSON cannot write: configurations leave them out
DPM_SOLVER = INFINITE | {
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
    "variance_type": None,
}
DISTILLED = {
    "beta_schedule": "scaled_linear",
    "original_inference_steps": 50,
    "set_alpha_to_one": True,
    "timestep_scaling": 10.0,
}

CHOICES: dict[str, tuple] = {
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete", "continuous"),
    "beta_schedule": tuple(BETA_SCHEDULES),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large"),
    "solver_order": (1, 2, 3),
}
"""Accepted values, for every class that has the option."""

OFF_ONLY = frozenset(
    {
        "thresholding",
        "use_flow_sigmas",
        "use_dynamic_shifting",
        "shift_terminal",
        "solver_p",
    }
)
"""Options that no linear sampler of a diffusion model can honour: they must be false, null or absent."""

WITHOUT_EFFECT = frozenset(
    {
        "dynamic_thresholding_ratio",
        "sample_max_value",
        "flow_shift",
        "time_shift_type",
        "tensor_format",
        "timestep_values",
        "torch_dtype",
        "dtype",
        "use_safetensors",
    }
)
"""Options that only matter where one of OFF_ONLY is on, or never: of storage, of the first versions of diffusers."""

OF_THE_MODEL = MappingProxyType(
    {
        "rescale_betas_zero_snr": False,
        "timestep_type": "discrete",
        "predict_epsilon": True,  # before diffusers 0.9 false was what prediction_type="sample" is
    }
)
"""Options about how the model was trained, with the value a class that lacks them stands for."""

DIVERGENT = ("sde-dpmsolver++", 3, "heun")
"""The singlestep update whose D2 term, as diffusers writes it, grows from step to step."""

BORROWED = MappingProxyType(
    {
        "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
        "algorithm_type": ("dpmsolver", "dpmsolver++", "deis"),
    }
)
"""Values of one class that another takes for its own default, as diffusers does to swap schedulers."""


@dataclass(frozen=True)
class Sampler:
    """One diffusers scheduler class, as data."""

    options: Mapping[str, Any]
    grid: Callable[..., Grid]
    """of a schedule, options, a number of steps and, where it `takes` them, timesteps"""
    rows: Callable[[Grid, Options], Iterator[Row]]
    memory: Callable[[Options], str]
    variance_exploding: bool = False
    choices: Mapping[str, tuple] = field(default_factory=dict)
    takes: tuple[str, ...] = ()
    """which of `timesteps` and `sigmas` its `set_timesteps` takes"""


TIMESTEPS = ("timesteps",)


def _epsilon(o: Options) -> str:
    return "epsilon"


def _x0(o: Options) -> str:
    return "sample"


_exploding = partial(Sampler, grid=exploding_grid, memory=_epsilon, variance_exploding=True)
_midpoint = partial(_exploding, LATENT | LINSPACE | RESPACED, grid=partial(exploding_grid, round_karras=True))

CLASSES: dict[str, Sampler] = {
    "DDPMScheduler": Sampler(
        TRAINING | LEADING | ZERO_SNR | CLIP | {"variance_type": "fixed_small"},
        training_grid,
        ddim.ddpm,
        _x0,
        takes=TIMESTEPS,
    ),
    "DDIMScheduler": Sampler(
        TRAINING | LEADING | ZERO_SNR | CLIP | {"set_alpha_to_one": True, "eta": 0.0}, training_grid, ddim.ddim, _x0
    ),
    "PNDMScheduler": Sampler(
        TRAINING | LEADING | {"set_alpha_to_one": False, "skip_prk_steps": False},
        training_grid,
        ddim.pndm,
        ddim.pndm_memory,
    ),
    "LMSDiscreteScheduler": _exploding(TRAINING | LINSPACE | RESPACED, rows=k_diffusion.lms),
    "EulerDiscreteScheduler": _exploding(
        TRAINING
        | LINSPACE
        | RESPACED
        | ZERO_SNR
        | SIGMA_RANGE
        | {"interpolation_type": "linear", "timestep_type": "discrete", "final_sigmas_type": "zero"},
        rows=k_diffusion.euler,
        takes=("timesteps", "sigmas"),
    ),
    "EulerAncestralDiscreteScheduler": _exploding(TRAINING | LINSPACE | ZERO_SNR, rows=k_diffusion.euler_ancestral),
    "HeunDiscreteScheduler": _exploding(LATENT | LINSPACE | RESPACED | CLIP, rows=k_diffusion.heun, takes=TIMESTEPS),
    "KDPM2DiscreteScheduler": _midpoint(rows=k_diffusion.dpm2),
    "KDPM2AncestralDiscreteScheduler": _midpoint(rows=k_diffusion.dpm2_ancestral),
    "DPMSolverMultistepScheduler": Sampler(
        TRAINING
        | LINSPACE
        | RESPACED
        | ZERO_SNR
        | DPM_SOLVER
        | {"lower_order_final": True, "euler_at_final": False, "use_lu_lambdas": False},
        partial(preserving_grid, unrounded="squaredcos_cap_v2"),
        dpm_solver.multistep,
        dpm_solver.memory,
        choices={
            "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"),
            "solver_type": ("midpoint", "heun"),
        },
        takes=TIMESTEPS,
    ),
    "DPMSolverSinglestepScheduler": Sampler(
        TRAINING | RESPACED | DPM_SOLVER | {"lower_order_final": False},
        preserving_grid,
        dpm_solver.singlestep,
        dpm_solver.memory,
        choices={
            "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver"),
            "solver_type": ("midpoint", "heun"),
        },
        takes=TIMESTEPS,
    ),
    "DEISMultistepScheduler": Sampler(
        TRAINING
        | LINSPACE
        | RESPACED
        | {"solver_order": 2, "algorithm_type": "deis", "solver_type": "logrho", "lower_order_final": True},
        partial(preserving_grid, repeat_last=True),
        deis.deis,
        _epsilon,
        choices={"algorithm_type": ("deis",), "solver_type": ("logrho",)},
    ),
    "UniPCMultistepScheduler": Sampler(
        TRAINING
        | LINSPACE
        | RESPACED
        | ZERO_SNR
        | SIGMA_RANGE
        | {"solver_order": 2, "predict_x0": True, "solver_type": "bh2", "lower_order_final": True}
        | {"disable_corrector": (), "final_sigmas_type": "zero"},
        partial(preserving_grid, repeat_last=True),
        unipc.unipc,
        unipc.memory,
        choices={"solver_type": ("bh1", "bh2")},
    ),
    "LCMScheduler": Sampler(
        LATENT | LEADING | ZERO_SNR | CLIP | DISTILLED, distilled_grid, consistency.lcm, _x0, takes=TIMESTEPS
    ),
    "TCDScheduler": Sampler(
        LATENT | LEADING | ZERO_SNR | DISTILLED | {"eta": 0.3}, distilled_grid, consistency.tcd, _x0, takes=TIMESTEPS
    ),
}
"""Every supported class of diffusers, with its own defaults. `eta`, there an argument of `step`, is here an option."""

KNOWN = frozenset().union(OFF_ONLY, WITHOUT_EFFECT, OF_THE_MODEL, *(sampler.options for sampler in CLASSES.values()))

_PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "deis": ("DEISMultistepScheduler", {"algorithm_type": "deis"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}


def _named() -> Iterator[tuple[str, tuple[str, dict[str, Any]]]]:
    for name, (cls, preset) in _PLAIN.items():
        off = {option: False for option in LEVEL_SPACINGS if option in CLASSES[cls].options}
        yield name, (cls, preset | off)
        if off:
            yield f"{name}_karras", (cls, preset | off | {"use_karras_sigmas": True})


NAMES = MappingProxyType(dict(_named()))
"""Short names: the class and the options that each fixes."""


def name_of(config: Mapping[str, Any]) -> str | None:
    """The short name whose class and options a configuration has; None where there is none."""
    for name, (class_name, preset) in NAMES.items():
        defaults = CLASSES[class_name].options
        same = all(config.get(option, defaults.get(option)) == value for option, value in preset.items())
        if class_name == config.get("_class_name") and same:
            return name
    return None


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
    ) -> Table:
        """The table of a run of `num_inference_steps` steps, or of its last int(num_inference_steps * strength).

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

        Raises:
            ValueError: an argument is out of range, or the steps are too many for the sampler, or none is left.
        """
        if not 0 < strength <= 1:
            raise ValueError(f"strength={strength} must be in (0, 1]")
        if not 0 <= denoising_start < denoising_end <= 1:
            raise ValueError(
                f"denoising_start={denoising_start} must be below denoising_end={denoising_end}, both in 0 .. 1"
            )
        given = {"timesteps": timesteps, "sigmas": sigmas}
        given = {name: values for name, values in given.items() if values is not None}
        if given and strength < 1:
            raise ValueError(f"strength={strength} cuts num_inference_steps, and goes with no {' or '.join(given)}")
        grid = self._given_grid(given) if given else self._spaced_grid(operator.index(num_inference_steps))
        n = grid.requested
        first, last = (self._timestep_after(part) for part in (denoising_start, denoising_end))
        kept = len(grid) - n + min(int(n * strength), n)
        kept = min(kept, int(np.sum(grid.t < first))) if denoising_start else kept
        if kept < 1:
            raise ValueError(
                f"strength={strength}, denoising_start={denoising_start} leaves none of {n} steps; take more steps"
            )
        rest = grid.tail(kept)
        done = int(np.sum(rest.t >= last)) if denoising_end < 1 else kept
        if done < 1:
            raise ValueError(f"denoising_end={denoising_end} leaves none of {n} steps; take more steps")
        rows = self._rows(rest)
        ends = [place for place, row in enumerate(rows) if row.is_sample]
        return assemble(
            rows[: ends[done - 1] + 1],
            self.options.prediction_type,
            self.sampler.memory(self.options),
            variance_exploding=self.sampler.variance_exploding,
            init_noise_sigma=self._init_noise_sigma(grid.levels),
            clip=self.options.clip_sample_range if getattr(self.options, "clip_sample", False) else math.inf,
            guidance_interval=EVERYWHERE if guidance_interval is None else _interval(guidance_interval),
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
            levels = descending(name, values, 0, math.inf)
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


def _interval(levels: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = map(float, levels)
    except (TypeError, ValueError):
        low, high = np.nan, np.nan
    if not 0 <= low < high:
        raise ValueError(f"guidance_interval must be two noise levels, 0 <= low < high, not {levels!r}")
    return low, high


def from_config(config: Mapping[str, Any] | str, sampler: str | None = None, **overrides: Any) -> Scheduler:
    """A scheduler from a diffusers configuration or a name.

    Args:
        config: the content of a scheduler_config.json, `_class_name` included; or a name, on the noise schedule of
            Stable Diffusion 1.x.
        sampler: a name to use instead of `_class_name`. What the configuration says of the noise schedule, the
            prediction and the spacing of timesteps stays, as in diffusers' `X.from_config(pipe.scheduler.config)`.
        overrides: options of the class that replace the configuration's.

    A name is a short one ("dpmpp_2m_karras"; all are in `NAMES`), which fixes what it says, or a diffusers class.
    Options absent from `config` have the defaults of their diffusers class; an absent `clip_sample` is false.

    Raises:
        ValueError: an unknown name or option, a value that is not supported, or an option the class does not have.
    """
    if isinstance(config, str):
        config, sampler = STABLE_DIFFUSION, config
    if sampler is None and "_class_name" not in config:
        raise ValueError("the configuration has no '_class_name'; name a sampler: from_config(config, 'ddim')")
    class_name, preset = _resolve(sampler or config["_class_name"])
    cls = CLASSES[class_name]
    defaulted = config.get("_use_default_values", ())
    given = {k: v for k, v in config.items() if not k.startswith("_") and k not in defaulted} | preset
    given = {k: v for k, v in given.items() if not _borrowed(cls, k, v)} | overrides
    given = {k: v for k, v in given.items() if k not in INFINITE or v != INFINITE[k]}
    accepted = dict(cls.options) | {k: v for k, v in given.items() if k in cls.options}
    _check(class_name, given, set(overrides), Options(**accepted))
    saved = {"_class_name": class_name, "clip_sample": False} | accepted | given
    saved = {k: v for k, v in saved.items() if k not in INFINITE or k in given}
    saved["_use_default_values"] = sorted(set(cls.options) - set(given) - {"clip_sample"})
    return Scheduler(MappingProxyType(saved), cls, Options(**accepted), _noise_schedule(Options(**accepted)))


def _resolve(name: str) -> tuple[str, dict[str, Any]]:
    if name in CLASSES:
        return name, {}
    if name in NAMES:
        return NAMES[name]
    known = {known.lower(): known for known in (*NAMES, *CLASSES)}
    close = [known[match] for match in difflib.get_close_matches(str(name).lower(), known, cutoff=0.5)]
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known are {', '.join(NAMES)}"
    raise ValueError(f"unknown sampler {name!r}; {hint}")


def _borrowed(cls: Sampler, option: str, value: Any) -> bool:
    return value in BORROWED.get(option, ()) and value not in cls.choices.get(option, (value,))


def _check(class_name: str, given: Mapping[str, Any], overridden: set[str], o: Options) -> None:
    """Raise ValueError for what would be ignored and yet change the picture."""
    cls = CLASSES[class_name]
    for option, value in given.items():
        if not _is_finite(value):
            raise ValueError(f"{class_name}: {option}={value!r} is not a finite number")
        if option in OFF_ONLY and value:
            raise ValueError(f"{class_name}: {option}={value!r} is not supported, only false")
        foreign = option not in cls.options and option not in OFF_ONLY | WITHOUT_EFFECT
        is_request = option in overridden or not (option in KNOWN or value is None or value is False)
        if foreign and is_request:
            raise ValueError(f"{class_name} has no option {option!r}; it has {', '.join(sorted(cls.options))}")
        if foreign and value is not None and value != OF_THE_MODEL.get(option, value):
            raise ValueError(f"{class_name} does not support {option}={value!r}, which the model was trained with")
    for option, choices in (CHOICES | dict(cls.choices)).items():
        value = getattr(o, option, choices[0])
        if value not in choices:
            raise ValueError(f"{class_name}: {option}={value!r} is not supported, only {', '.join(map(repr, choices))}")
    _check_combinations(class_name, o)


def _is_finite(value: Any) -> bool:
    """False for infinity and NaN, and for a list with one of them."""
    values = value if isinstance(value, list | tuple) else [value]
    return all(not isinstance(number, float) or math.isfinite(number) for number in values)


def _check_combinations(class_name: str, o: Options) -> None:
    on = [option for option in LEVEL_SPACINGS if getattr(o, option, False)]
    if len(on) > 1:
        raise ValueError(f"{class_name}: only one of {', '.join(on)} can be true")
    if not 0 <= getattr(o, "eta", 0) <= 1:
        raise ValueError(f"{class_name}: eta={o.eta} must be in 0 .. 1")
    if not getattr(o, "clip_sample_range", 1) > 0:
        raise ValueError(f"{class_name}: clip_sample_range={o.clip_sample_range} must be more than 0")
    algorithm = getattr(o, "algorithm_type", "")
    if algorithm.endswith("dpmsolver") and o.final_sigmas_type == "zero":
        raise ValueError(f"{class_name}: algorithm_type={algorithm!r} needs final_sigmas_type='sigma_min'")
    if algorithm == "sde-dpmsolver" and o.solver_order == 3:
        raise ValueError(f"{class_name}: algorithm_type={algorithm!r} has no solver_order=3, only 1 and 2")
    if class_name == "DPMSolverSinglestepScheduler" and (algorithm, o.solver_order, o.solver_type) == DIVERGENT:
        raise ValueError(f"{class_name}: {' with '.join(map(str, DIVERGENT))} diverges; use solver_type='midpoint'")


def _noise_schedule(o: Options) -> NoiseSchedule:
    betas = o.trained_betas
    if betas is None:
        betas = BETA_SCHEDULES[o.beta_schedule](o.beta_start, o.beta_end, o.num_train_timesteps)
    return NoiseSchedule.from_betas(betas, getattr(o, "rescale_betas_zero_snr", False))
