"""From a diffusers scheduler configuration, or a sampler's name, to a `Scheduler`."""

import difflib
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

from sdjax.fields import Scale, Within, brief, checked
from sdjax.sampling.classes import CLASSES, INFINITE, NAMES, Sampler
from sdjax.sampling.grid import Options
from sdjax.sampling.schedule import BETA_SCHEDULES, LEVEL_SPACINGS, NoiseSchedule
from sdjax.sampling.scheduler import Scheduler

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
        "use_flow_sigmas",
        "use_dynamic_shifting",
        "shift_terminal",
        "solver_p",
    }
)
"""Options that no linear sampler of a diffusion model can honour: they must be false, null or absent."""

WITHOUT_EFFECT = frozenset(
    {
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

COMFYUIS_CFG_PLUS_PLUS = "_cfg_pp"  # after the name of a sampler

Beta = Annotated[float, Within(1e-9, 0.9999)]
Count = Annotated[int, Within(1, 100_000)]
KINDS: dict[str, Any] = {
    **{name: bool | None for own in CLASSES.values() for name, value in own.options.items() if isinstance(value, bool)},
    "num_train_timesteps": Count,
    "beta_start": Beta,
    "beta_end": Beta,
    "trained_betas": Annotated[tuple[Beta, ...], Within(1, 100_000)] | None,
    "steps_offset": Annotated[int, Within(0, 100_000)],
    "clip_sample_range": Annotated[float, Within(0, 1e6)],
    "dynamic_thresholding_ratio": Annotated[float, Within(0, 1)],
    "sample_max_value": Annotated[float, Within(0, 1e6)],
    "eta": float,
    "sigma_min": Scale | None,
    "sigma_max": Scale | None,
    "lambda_min_clipped": Annotated[float, Within(-1e3, 1e3)],
    "original_inference_steps": Count,
    "timestep_scaling": Scale,
    "disable_corrector": Annotated[tuple[int, ...], Within(0, 100_000)],
}
"""Of the options that are no choice among words: what `sdjax.fields.checked` takes"""

KNOWN = frozenset().union(OFF_ONLY, WITHOUT_EFFECT, OF_THE_MODEL, *(sampler.options for sampler in CLASSES.values()))


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
    defaulted = checked("_use_default_values", config.get("_use_default_values"), tuple[str, ...] | None) or ()
    if strange := [name for name in config if not isinstance(name, str)]:
        raise ValueError(f"{class_name}: {brief(strange[0])} is no name of an option")
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
    name = name if isinstance(name, str) and len(name) < 100 else brief(name)
    if name in CLASSES:
        return name, {}
    if name in NAMES:
        return NAMES[name]
    known = {known.lower(): known for known in (*NAMES, *CLASSES)}
    close = [known[match] for match in difflib.get_close_matches(name.lower(), known, cutoff=0.5)]
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known are {', '.join(NAMES)}"
    if name.endswith(COMFYUIS_CFG_PLUS_PLUS):
        hint = f"CFG++ is cfg_plus_plus, with the sampler {name.removesuffix(COMFYUIS_CFG_PLUS_PLUS)!r}"
    raise ValueError(f"unknown sampler {name!r}; {hint}")


def _borrowed(cls: Sampler, option: str, value: Any) -> bool:
    return value in BORROWED.get(option, ()) and value not in cls.choices.get(option, (value,))


def _check(class_name: str, given: Mapping[str, Any], overridden: set[str], o: Options) -> None:
    """Raise ValueError for what would be ignored and yet change the picture."""
    cls = CLASSES[class_name]
    for option, value in given.items():
        if not _is_finite(value):
            raise ValueError(f"{class_name}: {option}={brief(value)} is not a finite number")
        if option in OFF_ONLY and value:
            raise ValueError(f"{class_name}: {option}={brief(value)} is not supported, only false")
        foreign = option not in cls.options and option not in OFF_ONLY | WITHOUT_EFFECT
        is_request = option in overridden or not (option in KNOWN or value is None or value is False)
        if foreign and is_request:
            raise ValueError(f"{class_name} has no option {option!r}; it has {', '.join(sorted(cls.options))}")
        if foreign and value is not None and value != OF_THE_MODEL.get(option, value):
            raise ValueError(f"{class_name} does not support {option}={brief(value)}, which the model was trained with")
        if option in cls.options and option in KINDS:
            try:
                checked(option, value, KINDS[option])
            except ValueError as error:
                raise ValueError(f"{class_name}: {error}") from None
    for option, choices in (CHOICES | dict(cls.choices)).items():
        value = getattr(o, option, choices[0])
        if value not in choices:
            raise ValueError(
                f"{class_name}: {option}={brief(value)} is not supported, only {', '.join(map(repr, choices))}"
            )
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
    for option in ("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value"):
        if not (value := getattr(o, option, 1)) > 0:
            raise ValueError(f"{class_name}: {option}={value} must be more than 0")
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
