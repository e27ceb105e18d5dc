"""Sizes of blocks."""


def largest_divisor(n: int, most: int) -> int:
    """The largest divisor of n up to most, 1 at least."""
    return next(d for d in range(max(1, min(n, most)), 0, -1) if n % d == 0)
