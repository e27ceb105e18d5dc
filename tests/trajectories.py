"""A sampler's trajectory, by its table and by PyTorch diffusers."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sdjax.sampling import Scheduler, Table, from_config

SHAPE = (2, 1, 2, 2)
STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "skip_prk_steps": True,
    "clip_sample": False,
}
ILL_CONDITIONED = ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
"""Few steps divide by a noise level of 0.03, of which float32 leaves 1e-5."""

LEVELS = ("sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down")


def model(x: Any, t: Any) -> Any:
    """A cheap nonlinear prediction, for arrays and tensors."""
    sin = torch.sin if isinstance(x, torch.Tensor) else np.sin
    return 0.7 * sin(x + float(t) / 300) + 0.3 * sin(3 * x)


def draws(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *SHAPE))


def run(table: Table, x: np.ndarray, noise: np.ndarray, f: Callable = model) -> np.ndarray:
    """x after every row, in float64."""
    anchor, past, states = x, [np.zeros_like(x)] * 3, []
    for i in range(len(table)):
        m = table.skip[i] * x + table.out[i] * f(table.cin[i] * x, table.t[i])
        clean = table.denoised[i, 0] * x + table.denoised[i, 1] * m
        clipped = clean.clip(-table.clip[i], table.clip[i]) - clean
        if table.threshold is not None and table.threshold[i, 0]:
            values = np.abs(clean).reshape(len(clean), -1)
            s = np.quantile(values, table.threshold[i, 0], axis=1).clip(1, table.clip[i]).reshape(-1, 1, 1, 1)
            clipped = clean.clip(-s, s) / s - clean
            m = m + table.threshold[i, 1] * clipped
        x, anchor = np.tensordot(table.mix[i], np.stack([x, anchor, m, *past, noise[i], clipped]), axes=1)
        past = [m, *past[:2]] if table.keep[i] else past
        states.append(x)
    return np.stack(states)


def scheduler(class_name: str, config: dict[str, Any]) -> Scheduler:
    eta = {k: v for k, v in config.items() if k == "eta"}
    rest = {k: v for k, v in config.items() if k != "eta"}
    return from_config(STABLE_DIFFUSION | {"_class_name": class_name} | rest, **eta)


class Oracle:
    """diffusers' scheduler in double precision, as far as it lets itself, with given noise in place of drawn noise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, class_name: str, config: dict[str, Any]):
        cls = getattr(diffusers, class_name)
        accepted = inspect.signature(cls.__init__).parameters
        config = STABLE_DIFFUSION | config
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # algorithm_type="dpmsolver" is deprecated there
            self.scheduler = s = cls(**{k: v for k, v in config.items() if k in accepted})
        if class_name in ILL_CONDITIONED:
            s.alphas_cumprod = torch.cumprod(1 - s.betas.double(), 0)
        self.eta = {"eta": config["eta"]} if "eta" in config else {}
        module = inspect.getmodule(cls)
        if hasattr(module, "randn_tensor"):
            monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: torch.tensor(self.draw))

    def configure(self, **options: Any) -> None:
        self.scheduler.register_to_config(**options)

    def set_timesteps(self, n: int | None = None, begin: int = 0, **given: Any) -> np.ndarray:
        """The timesteps of the last n - begin steps."""
        self.scheduler.set_timesteps(n, **given)
        first = begin * self.scheduler.order
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)
        for name in LEVELS:
            if hasattr(self.scheduler, name):
                setattr(self.scheduler, name, getattr(self.scheduler, name).double())
        self.timesteps = self.scheduler.timesteps[first:]
        return self.timesteps.numpy()

    def run(self, x: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """x after every model evaluation."""
        x, states = torch.tensor(x), []
        for t, draw in zip(self.timesteps, noise, strict=True):
            self.draw = draw
            output = model(self.scheduler.scale_model_input(x, t), t)
            x = self.scheduler.step(output, t, x, return_dict=False, **self.eta)[0]
            states.append(x.numpy())
        return np.stack(states)


def difference(states: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference at any step, relative to the largest value of that step."""
    axes = tuple(range(1, expected.ndim))
    return float((np.abs(states - expected).max(axes) / np.abs(expected).max(axes)).max())


def compare(ours: Scheduler, oracle: Oracle, n: int, strength: float = 1.0) -> float:
    """The difference of two runs of n steps; timesteps and the initial scale are asserted on the way."""
    return compare_tables(ours.table(n, strength), oracle, oracle.set_timesteps(n, begin=n - int(n * strength)))


def compare_tables(table: Table, oracle: Oracle, timesteps: np.ndarray) -> float:
    """The same of a table and the timesteps that were set."""
    np.testing.assert_allclose(table.t, timesteps, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(table.init_noise_sigma, float(oracle.scheduler.init_noise_sigma), rtol=1e-3)
    noise, start = draws(len(table)), draws(1, seed=1)[0] * table.init_noise_sigma
    expected = oracle.run(start, noise)
    assert np.isfinite(expected).all()
    return difference(run(table, start, noise), expected)
