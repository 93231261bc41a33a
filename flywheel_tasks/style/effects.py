"""The effect of one condition on a feature, with an interval that knows about clusters (Sec. 2.4.4).

One estimator covers every comparison the monitor makes. With the observations of arms a and b in clusters g,

    difference = mean_a - mean_b
    u_g = sum_{i in a, g} (x_i - mean_a) / n_a  -  sum_{i in b, g} (x_i - mean_b) / n_b
    variance = G / (G - 1) * sum_g u_g^2, the interval by Student's t with G - 1 degrees of freedom.

A pair in one cluster gives the paired interval, separate clusters Welch's, and prompts of one character count as what
they are: alike. Binary features get two successes and two failures more (Agresti and Caffo, Bonett and Price), because
a variance from zero of ten is no variance.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Kind = Literal["binary", "real"]
UNBOUNDED = 100.0
"""Cohen's d of two constants that differ: JSON has no infinity, and a gate must not skip it."""


class Effect(NamedTuple):
    """mean_a - mean_b with its interval; `size` is Cohen's h for prevalences, d for distributions."""

    n_a: int
    n_b: int
    clusters: int
    a: float | None
    b: float | None
    difference: float | None
    low: float | None
    high: float | None
    size: float | None
    p: float | None


def effect(
    a: FloatArray, b: FloatArray, cluster_a: npt.ArrayLike, cluster_b: npt.ArrayLike, kind: Kind, alpha: float = 0.05
) -> Effect:
    """Compare two samples; rows that are NaN don't count. Without two clusters there is no interval and no p-value."""
    ca, cb = np.asarray(cluster_a), np.asarray(cluster_b)
    keep_a, keep_b = ~np.isnan(a), ~np.isnan(b)
    a, ca, b, cb = a[keep_a], ca[keep_a], b[keep_b], cb[keep_b]
    if not len(a) or not len(b):
        only_a, only_b = (float(x.mean()) if len(x) else None for x in (a, b))
        return Effect(len(a), len(b), 0, only_a, only_b, None, None, None, None, None)
    names, index = np.unique(np.concatenate([ca.astype(str), cb.astype(str)]), return_inverse=True)
    in_a, in_b = index[: len(a)], index[len(a) :]
    mean_a, mean_b = float(a.mean()), float(b.mean())
    size = cohens_h(mean_a, mean_b) if kind == "binary" else cohens_d(a, b)
    low, high, p = _interval(a, b, in_a, in_b, len(names), kind, alpha)
    return Effect(len(a), len(b), len(names), mean_a, mean_b, mean_a - mean_b, low, high, size, p)


def cohens_h(a: float, b: float) -> float:
    """Difference of two prevalences where 1 % against 3 % weighs as much as it should."""
    return 2 * math.asin(math.sqrt(a)) - 2 * math.asin(math.sqrt(b))


def cohens_d(a: FloatArray, b: FloatArray) -> float | None:
    """Difference of means over the pooled standard deviation; without any deviation, as large as it gets."""
    difference = float(a.mean() - b.mean())
    freedom = len(a) + len(b) - 2
    if freedom < 1:
        return None
    pooled = math.sqrt((a.var() * len(a) + b.var() * len(b)) / freedom)
    if pooled == 0:
        return 0.0 if difference == 0 else math.copysign(UNBOUNDED, difference)
    return difference / pooled


def _interval(
    a: FloatArray,
    b: FloatArray,
    in_a: npt.NDArray[np.int64],
    in_b: npt.NDArray[np.int64],
    clusters: int,
    kind: Kind,
    alpha: float,
) -> tuple[float | None, float | None, float | None]:
    from scipy.stats import t

    if clusters < 2:
        return None, None, None
    if kind == "binary":
        # Each pseudo-observation is a cluster of its own: it belongs to no character.
        a, in_a = np.append(a, [0.0, 1.0]), np.append(in_a, [clusters, clusters + 1])
        b, in_b = np.append(b, [0.0, 1.0]), np.append(in_b, [clusters + 2, clusters + 3])
    total = clusters + (4 if kind == "binary" else 0)
    mean_a, mean_b = float(a.mean()), float(b.mean())
    u = np.bincount(in_a, (a - mean_a) / len(a), total) - np.bincount(in_b, (b - mean_b) / len(b), total)
    freedom = clusters - 1
    error = math.sqrt(clusters / freedom * float(u @ u))
    difference = mean_a - mean_b
    if error == 0:
        return difference, difference, 1.0 if difference == 0 else None
    half = error * float(t.ppf(1 - alpha / 2, freedom))
    p = 2 * float(t.sf(abs(difference) / error, freedom))
    low, high = difference - half, difference + half
    return (max(low, -1.0), min(high, 1.0), p) if kind == "binary" else (low, high, p)


class Slope(NamedTuple):
    """How much of a feature of the history a response repeats: its least-squares slope, by clusters."""

    n: int
    clusters: int
    slope: float | None
    low: float | None
    high: float | None
    p: float | None


def slope(x: FloatArray, y: FloatArray, cluster: npt.ArrayLike, alpha: float = 0.05) -> Slope:
    """Slope of y on x with a cluster-robust interval; None where x doesn't vary or there are too few clusters."""
    from scipy.stats import t

    names = np.asarray(cluster).astype(str)
    keep = ~(np.isnan(x) | np.isnan(y))
    x, y, names = x[keep], y[keep], names[keep]
    found, index = np.unique(names, return_inverse=True)
    centred = x - x.mean() if len(x) else x
    spread = float(centred @ centred)
    if spread == 0 or len(found) < 3:
        return Slope(len(x), len(found), None, None, None, None)
    value = float(centred @ (y - y.mean())) / spread
    residual = y - y.mean() - value * centred
    u = np.bincount(index, centred * residual) / spread
    freedom = len(found) - 2
    error = math.sqrt(len(found) / freedom * float(u @ u))
    half = error * float(t.ppf(1 - alpha / 2, freedom))
    p = 2 * float(t.sf(abs(value) / error, freedom)) if error else (1.0 if value == 0 else None)
    return Slope(len(x), len(found), value, value - half, value + half, p)
