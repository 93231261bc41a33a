"""Exact sums of integers: the means and squared standard errors of eq. 11, 13 and 15 without rounding on the way.

Integer addition has no order, so any split of the units over files, batches, threads or machines gives the same
bits. Squares past 2^63 are taken in 21-bit limbs, whose products add up in 64 bits over a whole block.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 16
"""Units per block: the working set stays in the cache, and a limb product times a block stays below 2^63."""

_LIMB = 21
_INT64 = 1 << 63


class Moments(NamedTuple):
    """Count, sum and sum of squares of an integer outcome over units, as Python integers."""

    n: int = 0
    total: int = 0
    squares: int = 0

    def plus(self, other: Moments) -> Moments:
        return Moments(self.n + other.n, self.total + other.total, self.squares + other.squares)


class Estimate(NamedTuple):
    """A mean and its squared standard error (eq. 15); None where the number of units doesn't allow it."""

    n: int
    mean: float | None
    se2: float | None


def dot(x: NDArray[np.int64], y: NDArray[np.int64]) -> int:
    """The exact inner product of two int64 vectors of non-negative values."""
    total = 0
    for at in range(0, len(x), BLOCK):
        total += _dot_block(x[at : at + BLOCK], y[at : at + BLOCK])
    return total


def _dot_block(x: NDArray[np.int64], y: NDArray[np.int64]) -> int:
    if len(x) == 0:
        return 0
    if int(x.max()) * int(y.max()) * len(x) < _INT64:
        return int(np.dot(x, y))
    xs, ys = _limbs(x), _limbs(y)
    return sum(int(np.dot(a, b)) << _LIMB * (i + j) for i, a in enumerate(xs) for j, b in enumerate(ys))


def _limbs(x: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    mask = (1 << _LIMB) - 1
    return [x & mask, (x >> _LIMB) & mask, x >> 2 * _LIMB]


def total(x: NDArray[np.int64]) -> int:
    """The exact sum of an int64 vector of non-negative values, of any size."""
    if len(x) == 0:
        return 0
    if int(x.max()) * len(x) < _INT64:
        return int(x.sum(dtype=np.int64))
    return (int((x >> 32).sum()) << 32) + int((x & 0xFFFFFFFF).sum())


def moments(x: NDArray[np.int64]) -> Moments:
    """The exact moments of a vector of non-negative outcomes, one per unit."""
    if int(x.max(initial=0)) ** 2 * len(x) < _INT64:
        return Moments(len(x), int(x.sum(dtype=np.int64)), int(np.dot(x, x)))
    return Moments(len(x), total(x), dot(x, x))


def estimate(m: Moments, scale: int = 1) -> Estimate:
    """Mean and squared standard error (sample variance over n) of outcome / scale, each rounded once."""
    mean = m.total / (m.n * scale) if m.n else None
    if m.n < 2:
        return Estimate(m.n, mean, None)
    spread = m.n * m.squares - m.total * m.total
    return Estimate(m.n, mean, spread / (m.n * m.n * (m.n - 1) * scale * scale))
