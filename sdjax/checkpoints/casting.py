"""Tensors as files hold them to arrays as devices take them: permuted, cast and checked in one pass over memory."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

T = TypeVar("T")

ALIGNMENT = 64  # bytes; XLA's CPU backend takes such an array as it is, without a copy
ROWS, COLUMNS = 256, 504  # of a block that stays in a core's cache; rows a power of two apart would fall on each other
WORKERS = min(8, os.cpu_count() or 1)
INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000, "float64": 0x7FF << 52}
"""The bits of infinity, by dtype: finite numbers are below, NaN is above; with the sign bit it is the same."""


def cast(source: np.ndarray, dtype: np.dtype) -> np.ndarray | None:
    """The values of an array of any strides, C-contiguous; None if one of them is NaN or infinite, or is in dtype."""
    target = _empty(source.shape, np.dtype(dtype))
    straight = source.ndim < 2 or source.flags.c_contiguous
    pairs = (_pieces if straight else _blocks)(source, target)
    largest = min(source.size, ROWS * max(COLUMNS, math.prod(source.shape[:-2])))
    # memory that is used again: to give it back and take fresh pages for every block takes longer than the cast
    wide, spare, row = (_empty((largest,), dtype) for dtype in (np.dtype(np.uint32), np.dtype(np.uint32), target.dtype))
    can_overflow = _largest(source.dtype) > _largest(target.dtype)
    for block, place in pairs:
        if not is_finite(block):
            return None
        contiguous = place if straight else _like(row, block)
        _convert(block, contiguous, _like(wide, block), _like(spare, block))
        if can_overflow and not is_finite(contiguous):
            return None
        if not straight:
            _bits(place)[...] = _bits(contiguous)
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


def _convert(source: np.ndarray, target: np.ndarray, wide: np.ndarray, spare: np.ndarray) -> None:
    """target = source, cast; all of one shape, the values finite; wide and spare are uint32 to work in.

    This is most of what loading takes, so the two usual casts are arithmetic on bits: eight times as fast as NumPy's
    from float16, and where ml_dtypes' to bfloat16 would let one thread work at a time.
    """
    if source.dtype == target.dtype:
        np.copyto(_bits(target), _bits(source))
        return
    if source.dtype == np.float16:
        source = _float32(source, wide)
    if source.dtype == np.float32 and target.dtype == ml_dtypes.bfloat16:
        _round(source, target, spare)
    else:
        with np.errstate(over="ignore"):  # for which the result is looked at
            np.copyto(target, source, casting="unsafe")


def _float32(halves: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """float16 to float32, exactly: bits to their new places, then times the ratio of the exponents' biases."""
    np.copyto(bits.view(np.int32), halves.view(np.int16))  # the sign is in all the upper bits
    bits <<= 13
    bits &= 0x8FFFE000  # sign, five bits of exponent, ten of fraction
    values = bits.view(np.float32)
    values *= np.float32(2.0**112)
    return values


def _round(values: np.ndarray, target: np.ndarray, bits: np.ndarray) -> None:
    """float32 to bfloat16, its upper half: to nearest, ties to even."""
    np.right_shift(values.view(np.uint32), 16, out=bits)
    bits &= 1
    bits += 0x7FFF
    bits += values.view(np.uint32)
    bits >>= 16
    np.copyto(_bits(target), bits, casting="unsafe")


def _bits(values: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers, which NumPy copies fast: ml_dtypes' numbers it copies one by one."""
    return values.view(f"u{values.itemsize}")


def is_finite(values: np.ndarray) -> bool:
    """Whether none is NaN or infinite. By their bits: as integers, those are the largest, of either sign."""
    if (infinity := INFINITY.get(values.dtype.name)) is None:
        return bool(np.isfinite(values).all())
    signed, unsigned = values.view(f"i{values.itemsize}"), _bits(values)
    sign = 1 << (8 * values.itemsize - 1)
    return bool(signed.max() < infinity and unsigned.max() < infinity | sign)


def _largest(dtype: np.dtype) -> float:
    """The largest number of a dtype, 0 for one without fractions."""
    return float(ml_dtypes.finfo(dtype).max) if dtype.kind in "fV" else 0.0


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that begins at a multiple of ALIGNMENT."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _like(buffer: np.ndarray, block: np.ndarray) -> np.ndarray:
    return buffer[: block.size].reshape(block.shape)


def in_parallel(function: Callable[..., T], jobs: Iterable[tuple[Any, ...]]) -> Iterator[T]:
    """function(*job) for each job, in order, by threads; only so many jobs at a time are in memory."""
    pending = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        for job in jobs:
            pending.append(pool.submit(function, *job))
            if len(pending) > WORKERS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
