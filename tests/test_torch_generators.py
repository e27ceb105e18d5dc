"""PyTorch's generators against live PyTorch on the CPU, published vectors of Philox, and what CUDA cards printed."""

from functools import partial

import numpy as np
import pytest
import torch

from sdjax.sampling import torch_generators

SEEDS = [0, 1, 1234, 2**31, 2**32 + 5, 2**63 + 1, 2**64 - 1]


@pytest.mark.parametrize("seed", SEEDS)
def test_torch_noise_is_what_a_cpu_generator_gives(seed):
    for shape in [*((n,) for n in range(41)), (3, 5, 7), (1, 4, 64, 64), (4, 96, 57)]:
        expected = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()
        result = torch_generators.TorchGenerator(seed).randn(shape)
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6, strict=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torch_noise_of_a_latent_in_half_precision_is_the_same_rounded(dtype):
    expected = torch.randn((4, 64, 64), dtype=dtype, generator=torch.Generator("cpu").manual_seed(5))
    result = torch.from_numpy(torch_generators.TorchGenerator(5).randn((4, 64, 64))).to(dtype)
    rounding = torch.finfo(dtype).eps * expected.abs().float()  # a value 1e-6 away may round to the next one
    assert ((result.float() - expected.float()).abs() <= rounding).all() and (result == expected).float().mean() > 0.99


def test_torch_noise_leaves_the_global_generators_alone():
    before = torch.get_rng_state()
    state = np.random.get_state()[1].copy()
    torch_generators.latents("torch", [5], (128, 128, 4), NONE)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


# "philox4x32 10" of tests/kat_vectors in Random123, its authors' library: counter, key, words
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter, key, expected):
    counter, key, expected = ([int(word, 16) for word in words.split()] for words in (counter, key, expected))
    columns = np.array([counter, counter[::-1]], np.uint64).T
    assert [int(words[0]) for words in torch_generators.philox(columns, key)] == expected


# torch.randn on CUDA cards as people printed it, to four decimals: seed, shape, index of the first value -> values
PRINTED = [
    (0, (12,), {0: [-0.9247, -0.4253, -2.6438, 0.1452, -0.1209, -0.5797, -0.6229, -0.3284]}),
    (0, (5, 8), {8: [-1.0745, -0.3631, -1.6711, 2.2655, 0.3117, -0.1842, 1.2866, 1.1820]}),
    (0, (5, 8), {16: [-0.1271, 1.2169, 1.4353, 1.0605, -0.4941, -1.4244, -0.7244, -1.2973]}),
    (1, (49, 12, 112), {0: [-0.2963, 2.6764, -0.1408]}),  # github.com/pytorch/pytorch/issues/143086, A100 and H100
    (10, (3,), {0: [-0.1029, 1.6810, -0.2708]}),  # github.com/pytorch/pytorch/issues/79496
    (42, (2, 5), {0: [0.1940, 2.1614, -0.1721, 0.8491, -1.9244, 0.6530, -0.6494, -0.8175, 0.5280, -1.2753]}),
    (42, (19,), {10: [-1.6621, -0.3033, -0.0926, 0.1992, -1.1204, 1.8577, -0.7145, 0.6881, 0.7968]}),
    (  # github.com/pytorch/pytorch/issues/158398, the same on both of its cards
        42,
        (1, 64, 2048),
        {
            2045: [1.4540, -2.7733, -0.8932, -0.4574, 0.8063, 0.1580],
            4093: [0.1124, 0.2769, -1.2535, 1.1346, -0.6329, -0.9147],
            6141: [-1.0001, -1.1552, -0.6955],
        },
    ),
]


@pytest.mark.parametrize(("seed", "shape", "printed"), PRINTED)
def test_cuda_noise_is_what_people_printed(seed, shape, printed):
    result = torch_generators.CudaGenerator(seed).randn(shape)
    assert result.dtype == np.float32 and result.shape == shape
    for start, values in printed.items():
        np.testing.assert_allclose(result.ravel()[start : start + len(values)], values, rtol=0, atol=5.1e-5)


def test_cuda_noise_of_a_tensor_with_another_mean_and_deviation():
    """github.com/pytorch/pytorch/issues/97097: normal_(5, 5**0.5) of (1000, 100), seed 14, RTX A4000 and 2070 Super"""
    result = 5 + 5**0.5 * torch_generators.CudaGenerator(14).randn((1000, 100)).astype(np.float64)
    printed = [
        [2.8731, 5.2727, 2.9889, 1.6853, 9.6331, 6.6319],
        [3.9968, 3.8097, 5.7328, 4.4029, 3.9804, 7.4698],
        [6.5552, 4.0857, 4.2315, 2.7704, 3.5479, 3.3063],
    ]
    np.testing.assert_allclose(result[:3, [0, 1, 2, -3, -2, -1]], printed, rtol=0, atol=5.1e-5)


def test_cuda_noise_takes_all_64_bits_of_the_seed():
    draws = [torch_generators.CudaGenerator(seed).randn((16,)) for seed in SEEDS]
    assert len({draw.tobytes() for draw in draws}) == len(SEEDS)


@pytest.mark.parametrize("kind", torch_generators.KINDS)
def test_noise_is_standard_normal(kind):
    values = torch_generators.KINDS[kind](3).randn((1 << 18,)).astype(np.float64)
    assert np.isfinite(values).all()
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((values**power).mean() - moment) < 4 * (variance / values.size) ** 0.5
    assert abs((values[1:] * values[:-1]).mean()) < 4 / values.size**0.5


NONE = np.zeros((3, 0), bool)


def test_latents_are_those_of_a_generator_for_each_seed():
    """With the draws of rows that come after them, here of rows 1 and 3 of the first image and 0 of the last."""
    seeds, draws = [7, 2**40, 7], np.zeros((3, 4), bool)
    draws[0, [1, 3]] = draws[2, 0] = True
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    expected = [[torch.randn((1, 4, 6, 5), generator=g) for _ in range(3)] for g in generators]
    [first], rows = torch_generators.latents("torch", seeds, (6, 5, 4), draws)
    assert_same = partial(np.testing.assert_allclose, rtol=0, atol=1e-6, strict=True)
    assert_same(first, torch.cat([own[0] for own in expected]).permute(0, 2, 3, 1))
    assert_same(rows[[0, 0, 2], [1, 3, 0]], torch.cat([*expected[0][1:], expected[2][1]]).permute(0, 2, 3, 1))
    assert not rows[~draws].any()
    assert torch_generators.latents("torch", seeds, (6, 5, 4), NONE)[1] is None
    none, rows = torch_generators.latents("torch", seeds, (6, 5, 4), draws, before=[])
    assert none == []
    assert_same(rows[0, [1, 3]], torch.cat(expected[0][:2]).permute(0, 2, 3, 1))


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_a_generator_goes_on_where_the_last_draw_ended(seed):
    """Also where a draw of less than 16 leaves half a pair, which a later one of less than 16 takes."""
    ours, theirs = torch_generators.TorchGenerator(seed), torch.Generator("cpu").manual_seed(seed)
    for count in [3, 1, 1, 0, 5, 17, 2, 16, 64, 7, 7, 33, 1]:
        expected = torch.randn(count, generator=theirs).numpy()
        np.testing.assert_allclose(ours.randn((count,)), expected, rtol=0, atol=1e-6, strict=True)


def test_a_cuda_generator_goes_on_with_the_next_block_of_each_element():
    """As cuRAND: a call of torch.randn moves the offset of every thread on by four words, a block of Philox."""
    generator = torch_generators.CudaGenerator(9)
    first, second = (generator.randn((4, 6, 5)) for _ in range(2))
    [latents], rows = torch_generators.latents("cuda", [9], (6, 5, 4), np.ones((1, 1), bool))
    np.testing.assert_array_equal(latents[0].transpose(2, 0, 1), first)
    np.testing.assert_array_equal(rows[0, 0].transpose(2, 0, 1), second)
    index = np.arange(120, dtype=np.uint64)
    words = torch_generators.philox((index * 0 + 1, index * 0, index, index * 0), (9, 0))[:2]
    u, v = ((word + 0.5) * 2.0**-32 for word in words)
    np.testing.assert_allclose(second.ravel(), np.sqrt(-2 * np.log(u)) * np.sin(2 * np.pi * v), rtol=0, atol=1e-5)


def test_a_kind_that_is_not_there():
    with pytest.raises(ValueError, match="noise must be one of 'torch', 'cuda', not 'mps'"):
        torch_generators.latents("mps", [0], (8, 8, 4), NONE)
