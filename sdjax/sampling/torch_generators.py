"""The standard normal noise that PyTorch's generators give, in NumPy: what another tool drew for a picture.

What is promised is the noise, equal to PyTorch's in float32. The picture is not: another order of summing, another data
type or another sampler changes it.
"""

import math
from collections.abc import Sequence

import numpy as np

LOW = 0xFFFFFFFF
WORD, HALF = np.uint64(LOW), np.uint64(32)
BLOCK = 16  # so many values torch.randn makes at a time
PHILOX_ROUNDS = 10
PHILOX_FACTORS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
PHILOX_STEPS = 0x9E3779B9, 0xBB67AE85
CURAND_STEP = np.float32(2.3283064e-10)  # 2^-32
CURAND_TURN = CURAND_STEP * np.float32(6.2831855)


class TorchGenerator:
    """`torch.Generator("cpu").manual_seed(seed)`: MT19937, seeded with the low 32 bits of seed."""

    def __init__(self, seed: int):
        self._generator = np.random.RandomState(seed & LOW)
        self._spare = np.empty(0, np.float32)

    def randn(self, shape: tuple[int, ...]) -> np.ndarray:
        """float32, the next `torch.randn(shape, generator=generator)` to 1e-6.

        In float16 and bfloat16 PyTorch's noise is this, rounded, where the number of elements is a multiple of 16, as a
        latent's mostly is.
        """
        count = math.prod(shape)
        return (self._filled if count >= BLOCK else self._in_turn)(count).reshape(shape)

    def _words(self, count: int) -> np.ndarray:
        return self._generator.randint(0, 1 << 32, count, dtype=np.uint32)

    def _filled(self, count: int) -> np.ndarray:
        """count >= 16 values, of one word each. Where they are no whole blocks, the last 16 are drawn anew as one."""
        whole = count - count % BLOCK
        values = np.empty(count, np.float32)
        values[:whole] = _blocks(self._words(count)[:whole])
        if whole < count:
            values[-BLOCK:] = _blocks(self._words(BLOCK))
        return values

    def _in_turn(self, count: int) -> np.ndarray:
        """Box-Muller on pairs (u1, u2) of the low 53 bits of two words each, in float64:

        sqrt(-2 log(1 - u2)) cos(2 pi u1), then the same with sin. What is left of a pair is the next call's first.
        """
        pairs = (count - len(self._spare) + 1) // 2
        high, low = self._words(4 * pairs).astype(np.uint64).reshape(-1, 2).T
        u1, u2 = (((high << HALF | low) & np.uint64(2**53 - 1)) * 2.0**-53).reshape(-1, 2).T
        radius, angle = np.sqrt(-2 * np.log1p(-u2)), 2 * np.pi * u1
        made = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()
        values = np.concatenate([self._spare, made.astype(np.float32)])
        self._spare = values[count:]
        return values[:count]


def _blocks(words: np.ndarray) -> np.ndarray:
    """Box-Muller on blocks of 16 words, whose low 24 bits are u1 (8 times) and u2 (8 times), in float32:

    8 times sqrt(-2 log(1 - u1)) cos(2 pi u2), then 8 times the same with sin.
    """
    uniform = (words & 0xFFFFFF).astype(np.float32).reshape(-1, 2, BLOCK // 2) * np.float32(2**-24)
    radius, angle = np.sqrt(-2 * np.log(1 - uniform[:, 0])), np.float32(2 * np.pi) * uniform[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()


class CudaGenerator:
    """`torch.Generator("cuda").manual_seed(seed)`: cuRAND's Philox4x32-10, a subsequence for each element.

    PyTorch gives these values while every element has its own thread on the card: up to 40,960 elements on a T4,
    43,008 on an RTX 3060, 125,952 on an RTX 3090, 221,184 on an A100 (multiprocessors times threads of each). Its
    elements past that are others on every model of card, and never these. A latent of 4x64x64 has 16,384, one of
    4x128x128 has 65,536.
    """

    def __init__(self, seed: int):
        self._key = (seed & LOW, seed >> 32)
        self._calls = 0

    def randn(self, shape: tuple[int, ...]) -> np.ndarray:
        """float32, the next `torch.randn(shape, device="cuda", generator=generator)`, to the rounding of the card's
        sine.

        Each element's is the first normal of a block of its subsequence; a call takes a block of all.
        """
        index = np.arange(math.prod(shape), dtype=np.uint64)
        call = np.full_like(index, self._calls)
        self._calls += 1
        x, y, _, _ = philox((call, np.zeros_like(index), index & WORD, index >> HALF), self._key)
        radius = np.sqrt(-2 * np.log(_uniform(x, CURAND_STEP)))
        return (radius * np.sin(_uniform(y, CURAND_TURN))).astype(np.float32).reshape(shape)


def _uniform(words: np.ndarray, step: np.float32) -> np.ndarray:
    """step words + step / 2 in float32 with a single rounding, as the card's multiply-add has; returned as float64."""
    return np.float32(words.astype(np.float32) * np.float64(step) + np.float64(step / 2)).astype(np.float64)


def philox(counter: Sequence[np.ndarray], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3").

    4 words of counter to 4 random words; each a uint64 array of values below 2^32.
    """
    a, b, c, d = counter
    for i in range(PHILOX_ROUNDS):
        first, second = (np.uint64(word + i * step & LOW) for word, step in zip(key, PHILOX_STEPS, strict=True))
        p, q = a * PHILOX_FACTORS[0], c * PHILOX_FACTORS[1]
        a, b, c, d = q >> HALF ^ b ^ first, q & WORD, p >> HALF ^ d ^ second, p & WORD
    return a, b, c, d


KINDS = {"torch": TorchGenerator, "cuda": CudaGenerator}


def latents(
    kind: str,
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    draws: np.ndarray,
    *,
    before: Sequence[tuple[int, ...]] | None = None,
) -> tuple[list[np.ndarray], np.ndarray | None]:
    """What PyTorch draws for 1 x C x h x w latents, float32: [B h w C] before the rows, and then for the rows
    [B R h w C].

    Each seed has a generator of its own. Rows draw where draws [B R] is true, and are 0 elsewhere; None where no row
    draws. before: the shapes of what is drawn before the rows, in place of that of the latents, channels last.
    kind: a key of KINDS. seeds: 0 .. 2^64 - 1. Raises ValueError for a kind that is not there.
    """
    if kind not in KINDS:
        raise ValueError(f"noise must be one of {', '.join(map(repr, KINDS))}, not {kind!r}")
    generators = [KINDS[kind](int(seed)) for seed in seeds]

    def draw(generator: TorchGenerator | CudaGenerator, shape: tuple[int, ...] = shape) -> np.ndarray:
        return np.moveaxis(generator.randn((shape[-1], *shape[:-1])), 0, -1)

    before = [shape] if before is None else before
    first = [np.stack([draw(generator, own) for generator in generators]) for own in before]
    if not draws.any():
        return first, None
    rows = np.zeros((*draws.shape, *shape), np.float32)
    for image, row in np.argwhere(draws):
        rows[image, row] = draw(generators[image])
    return first, rows
