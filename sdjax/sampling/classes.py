"""The scheduler classes of PyTorch diffusers and the short names of samplers, as data."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

from sdjax.sampling import consistency, ddim, deis, dpm_solver, k_diffusion, unipc
from sdjax.sampling.grid import (
    Grid,
    Options,
    ascending_grid,
    distilled_grid,
    exploding_grid,
    preserving_grid,
    training_grid,
)
from sdjax.sampling.schedule import LEVEL_SPACINGS
from sdjax.sampling.table import Row

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
THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
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
        TRAINING | LEADING | ZERO_SNR | CLIP | THRESHOLD | {"variance_type": "fixed_small"},
        training_grid,
        ddim.ddpm,
        _x0,
        takes=TIMESTEPS,
    ),
    "DDIMScheduler": Sampler(
        TRAINING | LEADING | ZERO_SNR | CLIP | THRESHOLD | {"set_alpha_to_one": True, "eta": 0.0},
        training_grid,
        ddim.ddim,
        _x0,
    ),
    "DDIMInverseScheduler": Sampler(
        TRAINING | LEADING | ZERO_SNR | CLIP | {"set_alpha_to_one": True},
        ascending_grid,
        ddim.ddim_inverse,
        _epsilon,
        choices={"timestep_spacing": ("leading", "trailing")},
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
        | THRESHOLD
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
        TRAINING | RESPACED | DPM_SOLVER | THRESHOLD | {"lower_order_final": False},
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
        | THRESHOLD
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
        | THRESHOLD
        | {"solver_order": 2, "predict_x0": True, "solver_type": "bh2", "lower_order_final": True}
        | {"disable_corrector": (), "final_sigmas_type": "zero"},
        partial(preserving_grid, repeat_last=True),
        unipc.unipc,
        unipc.memory,
        choices={"solver_type": ("bh1", "bh2")},
    ),
    "LCMScheduler": Sampler(
        LATENT | LEADING | ZERO_SNR | CLIP | THRESHOLD | DISTILLED,
        partial(distilled_grid, ends_clean=True),
        consistency.lcm,
        _x0,
        takes=TIMESTEPS,
    ),
    "TCDScheduler": Sampler(
        LATENT | LEADING | ZERO_SNR | DISTILLED | {"eta": 0.3},
        partial(distilled_grid, ends_clean=False),
        consistency.tcd,
        _x0,
        takes=TIMESTEPS,
    ),
}
"""Every supported class of diffusers, with its own defaults. `eta`, there an argument of `step`, is here an option."""

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
