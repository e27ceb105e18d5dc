"""Noise schedules: betas, noise levels, and the timesteps a sampler visits. NumPy, float64.

The forward process is x_t = alpha_t x_0 + sigma_t eps with alpha_t^2 + sigma_t^2 = 1, alpha_t^2 = prod(1 - beta). A
*noise level* is the ratio sigma_t / alpha_t: what diffusers keeps in `scheduler.sigmas`, zero for a clean image and
infinite where nothing of it is left.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

MAX_BETA = 0.999
ZERO_SNR_ALPHA_BAR = 2.0**-24  # stands for 0 where a sampler needs a finite noise level


def _linear(start: float, end: float, steps: int) -> Array:
    return np.linspace(start, end, steps)


def scaled_linear(start: float, end: float, steps: int) -> Array:
    """Linear in sqrt(beta): latent diffusion, Rombach et al. 2022."""
    return np.linspace(start**0.5, end**0.5, steps) ** 2


def _sigmoid(start: float, end: float, steps: int) -> Array:
    """GeoDiff, Xu et al. 2022."""
    return (end - start) / (1 + np.exp(-np.linspace(-6, 6, steps))) + start


def _squaredcos_cap_v2(start: float, end: float, steps: int) -> Array:
    """alpha_bar(u) = cos^2((u + 0.008) / 1.008 * pi / 2), u in 0..1; `start` and `end` are unused.

    Nichol and Dhariwal 2021, eq. 17.
    """
    alpha_bar = np.cos((np.linspace(0, 1, steps + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], MAX_BETA)


BETA_SCHEDULES: dict[str, Callable[[float, float, int], Array]] = {
    "linear": _linear,
    "scaled_linear": scaled_linear,
    "squaredcos_cap_v2": _squaredcos_cap_v2,
    "sigmoid": _sigmoid,
}


def rescale_zero_terminal_snr(alpha_bar: Array) -> Array:
    """Shift and scale sqrt(alpha_bar) so that its last value is 0 and its first is kept. [T] -> [T]

    Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", algorithm 1.
    """
    root = np.sqrt(alpha_bar)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def noise_level(alpha_bar: ArrayLike) -> Array:
    """sigma / alpha = sqrt((1 - alpha_bar) / alpha_bar), infinite at alpha_bar = 0."""
    alpha_bar = np.asarray(alpha_bar, np.float64)
    with np.errstate(divide="ignore"):
        return np.sqrt((1 - alpha_bar) / alpha_bar)


def variance_preserving(level: ArrayLike) -> tuple[Array, Array]:
    """(alpha, sigma) with sigma / alpha = level and alpha^2 + sigma^2 = 1; the level may be 0 or infinite."""
    alpha = 1 / np.hypot(1, level)
    return alpha, np.sqrt(1 - alpha**2)


def spaced_timesteps(spacing: str, n: int, train: int, offset: int, last: int, skip_zero: bool) -> Array:
    """`n` descending timesteps out of 0 .. last - 1. [n]

    linspace: evenly from last - 1 to 0, fractional. leading: multiples of last // n, plus `offset`. trailing: every
    train / n-th, from last - 1 down (fewer than n where last < train). `skip_zero` lays out n + 1 and leaves out the
    last, for samplers whose final step ends there. Lin et al. 2023, table 2.
    """
    points = n + skip_zero
    if spacing == "linspace":
        return np.linspace(0, last - 1, points)[::-1][:n]
    if spacing == "leading":
        return (np.arange(points) * (last // points))[::-1][:n] + float(offset)
    if spacing == "trailing":
        return np.arange(last, 0, -train / n)[:n].round() - 1
    raise ValueError(f"timestep_spacing {spacing!r} is none of 'linspace', 'leading', 'trailing'")


def _karras(low: float, high: float, n: int, rho: float = 7.0) -> Array:
    """Even in level^(1/7). Karras et al. 2022, eq. 5."""
    return np.linspace(high ** (1 / rho), low ** (1 / rho), n) ** rho


def _exponential(low: float, high: float, n: int) -> Array:
    """Even in log level. Lu et al. 2022 (DPM-Solver), section 3.3."""
    return np.exp(np.linspace(np.log(high), np.log(low), n))


def _beta(low: float, high: float, n: int) -> Array:
    """Quantiles of Beta(0.6, 0.6). Lee et al. 2024, "Beta Sampling is All You Need"."""
    from scipy.special import betaincinv

    return low + (high - low) * betaincinv(0.6, 0.6, np.linspace(1, 0, n))


LEVEL_SPACINGS: dict[str, Callable[[float, float, int], Array]] = {
    "use_karras_sigmas": _karras,
    "use_exponential_sigmas": _exponential,
    "use_beta_sigmas": _beta,
    "use_lu_lambdas": _exponential,
}


class NoiseSchedule:
    """The forward process a model was trained on: `alpha_bar` and noise `levels`, both [T], indexed by timestep."""

    def __init__(self, alpha_bar: Array):
        self.alpha_bar = alpha_bar
        self.levels = noise_level(alpha_bar)

    @classmethod
    def from_betas(cls, betas: ArrayLike, zero_terminal_snr: bool = False) -> "NoiseSchedule":
        alpha_bar = np.cumprod(1 - np.asarray(betas, np.float64))
        return cls(rescale_zero_terminal_snr(alpha_bar) if zero_terminal_snr else alpha_bar)

    def __len__(self) -> int:
        return len(self.alpha_bar)

    def with_finite_levels(self) -> "NoiseSchedule":
        """alpha_bar = 0 replaced by 2^-24, as samplers that count in noise levels need it."""
        return NoiseSchedule(np.where(self.alpha_bar > 0, self.alpha_bar, ZERO_SNR_ALPHA_BAR))

    def level_at(self, t: ArrayLike) -> Array:
        """Noise level at (possibly fractional) timesteps, linear in between and constant beyond the ends."""
        return np.interp(t, np.arange(len(self)), self.levels)

    def timestep_at(self, level: ArrayLike) -> Array:
        """Inverse of `level_at`, but linear in the logarithm of the level."""
        return np.interp(np.log(level), np.log(self.levels), np.arange(len(self)))
