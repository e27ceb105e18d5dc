"""Noise schedules against closed forms and PyTorch diffusers."""

import numpy as np
import pytest
from diffusers import DDIMScheduler, DDPMScheduler
from scipy import stats

from sdjax.sampling import schedule
from sdjax.sampling.schedule import BETA_SCHEDULES, LEVEL_SPACINGS, NoiseSchedule, spaced_timesteps


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_betas(name):
    expected = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=name)
    betas = BETA_SCHEDULES[name](0.00085, 0.012, 1000)
    np.testing.assert_allclose(betas, expected.betas, rtol=3e-3, atol=2e-7)
    np.testing.assert_allclose(NoiseSchedule.from_betas(betas).alpha_bar, expected.alphas_cumprod, rtol=3e-5)


def test_zero_terminal_snr():
    betas = BETA_SCHEDULES["scaled_linear"](0.00085, 0.012, 1000)
    ours = NoiseSchedule.from_betas(betas, zero_terminal_snr=True)
    expected = DDIMScheduler(0, beta_schedule="linear", trained_betas=betas.tolist(), rescale_betas_zero_snr=True)
    np.testing.assert_allclose(ours.alpha_bar, expected.alphas_cumprod, rtol=2e-3, atol=1e-7)
    assert ours.alpha_bar[-1] == 0 and ours.levels[-1] == np.inf
    assert ours.with_finite_levels().levels[-1] == pytest.approx(4096, rel=1e-6)


def test_levels_and_timesteps_are_inverse():
    ours = NoiseSchedule.from_betas(BETA_SCHEDULES["scaled_linear"](0.00085, 0.012, 1000))
    t = np.arange(1000)
    np.testing.assert_allclose(ours.timestep_at(ours.level_at(t)), t, atol=1e-6)
    np.testing.assert_array_equal(ours.level_at([-5, 1e4]), ours.levels[[0, -1]])


def test_variance_preserving():
    level = np.array([0, 1e-3, 1, 1e6, np.inf])
    alpha, sigma = schedule.variance_preserving(level)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1)
    np.testing.assert_allclose(sigma[:-1], level[:-1] * alpha[:-1])
    assert (alpha[-1], sigma[-1]) == (0, 1)


@pytest.mark.parametrize(
    ("spacing", "skip_zero", "expected"),
    [
        ("linspace", False, [999, 666, 333, 0]),
        ("linspace", True, [999, 749.25, 499.5, 249.75]),
        ("leading", False, [751, 501, 251, 1]),
        ("leading", True, [801, 601, 401, 201]),
        ("trailing", False, [999, 749, 499, 249]),
    ],
)
def test_spaced_timesteps(spacing, skip_zero, expected):
    np.testing.assert_allclose(spaced_timesteps(spacing, 4, 1000, 1, 1000, skip_zero), expected)


def test_trailing_has_as_many_timesteps_as_asked():
    """A step that floating point does not hold exactly must not add a timestep -1."""
    for n in range(1, 1001):
        t = spaced_timesteps("trailing", n, 1000, 0, 1000, False)
        assert len(t) == n and t[-1] >= 0


def test_unknown_spacing():
    with pytest.raises(ValueError, match="'cubic' is none of"):
        spaced_timesteps("cubic", 4, 1000, 0, 1000, False)


def test_level_spacings():
    low, high = 0.03, 14.6
    for space in LEVEL_SPACINGS.values():
        levels = space(low, high, 9)
        np.testing.assert_allclose(levels[[0, -1]], [high, low])
        assert (np.diff(levels) < 0).all()
    np.testing.assert_allclose(np.diff(LEVEL_SPACINGS["use_karras_sigmas"](low, high, 9) ** (1 / 7), 2), 0, atol=1e-12)
    np.testing.assert_allclose(
        np.diff(np.log(LEVEL_SPACINGS["use_exponential_sigmas"](low, high, 9)), 2), 0, atol=1e-12
    )
    quantiles = (LEVEL_SPACINGS["use_beta_sigmas"](low, high, 9) - low) / (high - low)
    np.testing.assert_allclose(stats.beta.cdf(quantiles, 0.6, 0.6), np.linspace(1, 0, 9), atol=1e-9)
