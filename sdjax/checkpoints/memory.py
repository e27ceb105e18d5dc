"""Files as arrays in a memory map, whose pages need not stay in memory once they were read."""

import mmap
from pathlib import Path

import numpy as np

PAGE = mmap.ALLOCATIONGRANULARITY


def mapped(path: Path) -> np.ndarray:
    """[bytes of the file] uint8, read-only, read from the disk where it is accessed. ValueError for an empty file."""
    with open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def part(data: np.ndarray, start: int, dtype: np.dtype, elements: int) -> np.ndarray:
    """elements of dtype that begin at a byte of data; ValueError where they go past the end."""
    end = start + elements * dtype.itemsize
    if not 0 <= start <= end <= data.size:
        raise ValueError(f"{elements} elements of {dtype} at byte {start} go past the end, {data.size}")
    return data[start:end].view(dtype)


def release(array: np.ndarray) -> None:
    """Lets the system take back the memory of a view of a mapped file. The view stays valid: it is read again."""
    base = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") and array.nbytes >= PAGE:
        low, high = np.lib.array_utils.byte_bounds(array)
        origin = np.frombuffer(base, np.uint8).ctypes.data
        start = (low - origin) // PAGE * PAGE
        base.madvise(mmap.MADV_DONTNEED, start, high - origin - start)
