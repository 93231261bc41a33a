"""Win-rates and their intervals (Sec. 2.5.1): how often one model's response is preferred over another's.

A tie is half a win. Prompts of one character are alike, so an interval resamples whole characters, not prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Interval = tuple[float, float]

_CELLS = 1 << 22
"""Draws × clusters held at once: 32 MiB of float64."""
_FEW = 10
"""Below so many clusters resampling them says too little: of two it has three means to give."""


class WinRate(NamedTuple):
    """A win-rate over n comparisons in `clusters` characters, with its interval."""

    rate: float
    low: float
    high: float
    n: int
    clusters: int
    wins: int
    ties: int
    losses: int


def compare(candidate: ArrayLike, champion: ArrayLike) -> Floats:
    """1 where the candidate's score is higher, 0 where it is lower, 1/2 where they are equal."""
    a, b = _finite(candidate, "candidate"), _finite(champion, "champion")
    if a.shape != b.shape:
        raise ValueError(
            f"{a.size} scores of the candidate, {b.size} of the champion: they must be of the same prompts"
        )
    return 0.5 + 0.5 * np.sign(a - b)


def outcomes(candidate: ArrayLike, champion: ArrayLike, lost: NDArray[np.bool_], won: NDArray[np.bool_]) -> Floats:
    """1, 1/2 or 0 a row from the scores of both responses. A model that failed to answer has `lost` the row; where both
    failed, or an answer has no score, nothing can be said of it: NaN."""
    a, b = np.asarray(candidate, dtype=np.float64), np.asarray(champion, dtype=np.float64)
    known = np.isfinite(a) & np.isfinite(b) & ~lost & ~won
    found = np.full(len(known), np.nan)
    found[known] = compare(a[known], b[known])
    found[lost & ~won], found[won & ~lost] = 0.0, 1.0
    return found


def win_rate(
    outcomes: ArrayLike, clusters: Sequence[Any], *, alpha: float = 0.05, draws: int = 2000, seed: int = 0
) -> WinRate:
    """The mean outcome (1, 1/2 or 0 each) and its interval by clusters."""
    y = _finite(outcomes, "outcomes")
    if y.size == 0:
        raise ValueError("no comparison: a win-rate of nothing is not a number")
    if y.size != len(clusters):
        raise ValueError(f"{y.size} outcomes, {len(clusters)} cluster names")
    if not np.isin(y, (0.0, 0.5, 1.0)).all():
        raise ValueError("an outcome is 1 (win), 0.5 (tie) or 0 (loss)")
    low, high = cluster_bootstrap(y, clusters, alpha=alpha, draws=draws, seed=seed)
    names = len(set(clusters))
    counts = [int((y == value).sum()) for value in (1.0, 0.5, 0.0)]
    return WinRate(float(y.mean()), low, high, y.size, names, *counts)


def cluster_bootstrap(
    values: ArrayLike, clusters: Sequence[Any], *, alpha: float = 0.05, draws: int = 2000, seed: int = 0
) -> Interval:
    """Interval of the mean of values in [0, 1], from resampled clusters.

    Percentiles are widened as Hesterberg (2015) does, to what Student's t asks of this number of clusters: plain ones
    cover too rarely below some fifty. No percentile lies beyond the clusters' own means, so of few clusters it is
    Student's t with the jackknife's error instead. Where clusters all agree either would claim certainty; Wilson's
    interval over the number of clusters stands in. One cluster says nothing of others: [0, 1].
    """
    y = _finite(values, "values")
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(index, weights=y).astype(np.float64)
    sizes = np.bincount(index).astype(np.float64)
    count = sizes.size
    if count < 2:
        return 0.0, 1.0
    if np.ptp(sums / sizes) == 0:
        return wilson(float(y.mean()), count, alpha)
    from scipy.stats import t

    quantile = float(t.ppf(alpha / 2, count - 1))
    if count < _FEW:
        return _jackknife(sums, sizes, -quantile)
    tail = NormalDist().cdf(math.sqrt(count / (count - 1)) * quantile)
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    step = max(1, _CELLS // count)
    for start in range(0, draws, step):
        weights = rng.multinomial(count, np.full(count, 1 / count), size=min(step, draws - start)).astype(np.float64)
        means[start : start + step] = (weights @ sums) / (weights @ sizes)
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _jackknife(sums: Floats, sizes: Floats, quantile: float) -> Interval:
    """The mean and as many of its standard errors on both sides, from the means without each cluster in turn, which
    hold where one cluster is far larger than the others."""
    count, mean = sizes.size, float(sums.sum() / sizes.sum())
    without = (sums.sum() - sums) / (sizes.sum() - sizes)
    half = quantile * math.sqrt((count - 1) / count * float(np.square(without - mean).sum()))
    return max(0.0, mean - half), min(1.0, mean + half)


def wilson(rate: float, n: int, alpha: float = 0.05) -> Interval:
    """Wilson's score interval of a proportion of n independent trials."""
    z = NormalDist().inv_cdf(1 - alpha / 2)
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def difference(a: float, a_bounds: Interval, b: float, b_bounds: Interval) -> Interval:
    """Interval of a - b from the two intervals (Newcombe's square-and-add; MOVER where they are clustered)."""
    low = (a - b) - math.hypot(a - a_bounds[0], b_bounds[1] - b)
    high = (a - b) + math.hypot(a_bounds[1] - a, b - b_bounds[0])
    return max(-1.0, low), min(1.0, high)


def _finite(values: ArrayLike, what: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{what}: one number a row is expected, not shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{what}: row {int(np.flatnonzero(~np.isfinite(array))[0])} is not a finite number")
    return array
