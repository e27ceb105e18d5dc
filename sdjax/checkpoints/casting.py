"""Tensors as files hold them to arrays as devices take them: permuted, cast and checked in one pass over memory."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

ALIGNMENT = 64  # bytes; XLA's CPU backend takes such an array as it is, without a copy
ROWS, COLUMNS = 128, 504  # of a block that stays in a core's cache; rows a power of two apart would fall on each other
WORKERS = min(8, os.cpu_count() or 1)
INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000, "float64": 0x7FF << 52}
"""The bits of infinity, by dtype: finite numbers are below, NaN is above; with the sign bit it is the same."""


def cast(source: np.ndarray, dtype: np.dtype) -> np.ndarray | None:
    """The values of an array of any strides, C-contiguous; None if one of them is NaN or infinite."""
    target = _aligned(source.shape, np.dtype(dtype))
    straight = source.ndim < 2 or source.flags.c_contiguous
    for block, place in _pieces(source, target) if straight else _blocks(source, target):
        if not _is_finite(block):
            return None
        values = _float32(block) if block.dtype == np.float16 != target.dtype else block
        place[...] = values if straight else values.astype(target.dtype)  # what lies in a row is cast faster
    return target


def _pieces(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    for i in range(0, arrays[0].size, ROWS * COLUMNS):
        yield tuple(array.reshape(-1)[i : i + ROWS * COLUMNS] for array in arrays)


def _blocks(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Arrays [*K I O] in blocks [o i *K], the order in which a kernel lies in a file: its transpose is local then."""
    arrays = tuple(np.moveaxis(array, (-1, -2), (0, 1)) for array in arrays)
    rows, columns, *window = arrays[0].shape
    step = max(1, COLUMNS // max(1, math.prod(window)))
    for i in range(0, rows, ROWS):
        for j in range(0, columns, step):
            yield tuple(array[i : i + ROWS, j : j + step] for array in arrays)


def _float32(halves: np.ndarray) -> np.ndarray:
    """float16 to float32, exactly, for finite values: bits in their new places, times the ratio of the exponents' biases.

    NumPy's own takes eight times as long, and this is most of what loading a float16 checkpoint takes.
    """
    bits = halves.view(np.int16).astype(np.int32)  # the sign is in all upper bits
    bits <<= 13
    bits &= np.int32(-0x70002000)  # sign, five bits of the exponent, ten of the fraction: 0x8FFFE000
    values = bits.view(np.float32)
    values *= np.float32(2.0**112)
    return values


def _is_finite(values: np.ndarray) -> bool:
    """Looks at the bits: as integers, infinities and NaN are the largest, of either sign."""
    if (infinity := INFINITY.get(values.dtype.name)) is None:
        return bool(np.isfinite(values).all())
    sign = 1 << (8 * values.itemsize - 1)
    signed, unsigned = values.view(f"i{values.itemsize}"), values.view(f"u{values.itemsize}")
    return values.size == 0 or bool(signed.max() < infinity and unsigned.max() < infinity | sign)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def in_parallel(function: Callable[..., T], jobs: Iterable[tuple[Any, ...]]) -> Iterator[T]:
    """function(*job) for each job, in order, by threads; only so many jobs at a time are asked for and in memory."""
    pending = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        for job in jobs:
            pending.append(pool.submit(function, *job))
            if len(pending) > WORKERS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
