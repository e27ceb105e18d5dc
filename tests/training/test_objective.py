"""What the network is shown and what an error costs, against the formulas of PyTorch diffusers' examples."""

from dataclasses import replace

import jax
import numpy as np
import oracle
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch_training import draws

from sdjax import sampling
from sdjax.training.objective import Objective

SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
X0, PREDICTION = oracle.normal(2, 8, 8, 4, seed=1), oracle.normal(2, 8, 8, 4, seed=2)


def objective(prediction_type="epsilon", **options):
    config = {"_class_name": "DDPMScheduler", **SCHEDULER, "prediction_type": prediction_type}
    return Objective.of(sampling.from_config(config), **options)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_is_that_of_pytorch(prediction_type):
    ours, own = objective(prediction_type, snr_gamma=5.0), draws()
    x, target = ours.noised(X0, own)
    losses = ours.losses(PREDICTION, target, own.timesteps)
    scheduler = DDPMScheduler(**SCHEDULER)
    x0, noise, t = oracle.nchw(X0), oracle.nchw(own.noise), torch.tensor(own.timesteps).long()
    oracle.assert_close(x, oracle.nhwc(scheduler.add_noise(x0, noise, t)))
    targets = {"epsilon": noise, "sample": x0, "v_prediction": scheduler.get_velocity(x0, noise, t)}
    errors = (oracle.nchw(PREDICTION) - targets[prediction_type]).square().mean(dim=(1, 2, 3))
    snr = compute_snr(scheduler, t)
    divisors = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}
    weights = torch.clamp(snr, max=5.0) / divisors[prediction_type]
    np.testing.assert_allclose(losses, weights * errors, rtol=1e-4)


def test_offset_and_perturbation():
    """noise + o * offset is the target; the network is shown p * more."""
    ours = objective(noise_offset=0.1, input_perturbation=0.2)
    own = draws(offset=oracle.normal(2, 1, 1, 4, seed=3), perturbation=oracle.normal(2, 8, 8, 4, seed=4))
    x, target = ours.noised(X0, own)
    np.testing.assert_allclose(target, own.noise + 0.1 * own.offset, rtol=1e-6)
    a = np.float32(ours.alphas_cumprod)[own.timesteps][:, None, None, None]
    shown = target + 0.2 * own.perturbation
    np.testing.assert_allclose(x, np.sqrt(a) * X0 + np.sqrt(1 - a) * shown, rtol=1e-4, atol=1e-6)


def test_weights_and_masks():
    ours, own = objective(), draws()
    mask = np.float32(oracle.normal(2, 8, 8, 1) > 0)
    losses = ours.losses(PREDICTION, X0, own.timesteps, np.float32([1, 3]), mask)
    np.testing.assert_allclose(losses, [1, 3] * (mask * (PREDICTION - X0) ** 2).mean(axis=(1, 2, 3)), rtol=1e-5)


def test_zero_terminal_snr():
    ours = objective("v_prediction", zero_terminal_snr=True, snr_gamma=5.0)
    theirs = DDPMScheduler(**SCHEDULER, rescale_betas_zero_snr=True)
    np.testing.assert_allclose(ours.alphas_cumprod[:-1], theirs.alphas_cumprod[:-1], rtol=2e-3, atol=1e-6)
    assert ours.alphas_cumprod[-1] == 0
    last = draws(timesteps=np.int32([0, 999]))
    x, target = ours.noised(X0, last)
    np.testing.assert_array_equal(x[1], last.noise[1])
    assert np.isfinite(ours.losses(PREDICTION, target, last.timesteps)).all()
    with pytest.raises(ValueError, match="epsilon says nothing"):
        objective(zero_terminal_snr=True)
    objective(zero_terminal_snr=True, timestep_range=(0, 999))


def test_timesteps_are_drawn_as_often_as_is_asked():
    shape = (4000, 1, 1, 1)

    def timesteps(**options):
        return np.asarray(objective(**options).draws(jax.random.key(0), shape).timesteps)

    every = timesteps()
    assert every.min() < 10
    assert every.max() > 990
    assert every.mean() == pytest.approx(499.5, abs=15)
    some = timesteps(timestep_range=(200, 300))
    assert (some.min(), some.max()) == (200, 299)
    bias = {"timestep_bias_multiplier": 3.0, "timestep_bias_portion": 0.25}
    for strategy, biased in (("earlier", slice(0, 250)), ("later", slice(750, 1000)), ("range", slice(100, 350))):
        own = timesteps(timestep_bias_strategy=strategy, timestep_bias_begin=100, timestep_bias_end=350, **bias)
        share = np.isin(own, np.arange(1000)[biased]).mean()
        assert share == pytest.approx(0.5, abs=0.03)  # 3 * 250 of 3 * 250 + 750


def test_draws_are_those_that_are_used():
    plain = objective().draws(jax.random.key(1), (2, 4, 4, 4))
    assert plain.offset is None
    assert plain.perturbation is None
    both = objective(noise_offset=0.1, input_perturbation=0.1).draws(jax.random.key(1), (2, 4, 4, 4))
    np.testing.assert_array_equal(both.noise, plain.noise)
    assert both.offset.shape == (2, 1, 1, 4)
    drawn = [array for array in both[1:] if array.shape == (2, 4, 4, 4)]
    assert all(not np.array_equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_unknown_names_are_refused():
    for options in ({"prediction_type": "flow"}, {"timestep_bias_strategy": "late"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}="):
            replace(objective(), **options)
    with pytest.raises(ValueError, match="no timesteps"):
        objective(timestep_range=(1000, 2000))
