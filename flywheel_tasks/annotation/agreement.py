"""How far annotators agree (Sec. 3.4.1): raw agreement, Krippendorff's alpha, and each annotator against the others.

Everything is computed from one matrix, reviews counted by unit and label, so any number of annotators and any pattern
of missing reviews costs one pass.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
_CHUNK = 32


class Agreement(NamedTuple):
    """`None` where nothing can be said: no unit has two reviews, or (alpha) only one label was ever used."""

    units: int
    reviews: int
    raw: float | None
    """Chance that two reviews of one unit agree, over all such pairs of reviews."""
    unanimous: float | None
    """Share of the units with at least two reviews in which all agree."""
    alpha: float | None
    low: float | None
    high: float | None
    """95 % interval of alpha, resampling units."""


def counted(unit: IntArray, label: IntArray, units: int, labels: int) -> IntArray:
    """Reviews by unit and label."""
    table = np.zeros((units, labels), np.int64)
    np.add.at(table, (unit, label), 1)
    return table


def krippendorff_alpha(table: IntArray) -> float:
    """Nominal alpha = 1 - D_observed / D_expected (Krippendorff 2011) of reviews by unit and label; NaN if undefined.

    Units with one review can't disagree and do not count."""
    within, totals, sizes = _parts(table)
    return float(_alpha(within.sum(), totals.sum(axis=0)[None], sizes.sum())[0])


def agreement(table: IntArray, resamples: int = 400, seed: int = 0) -> Agreement:
    """All the statistics of reviews by unit and label."""
    within, totals, sizes = _parts(table)
    units, reviews = len(sizes), int(sizes.sum())
    if not units:
        return Agreement(0, 0, None, None, None, None, None)
    pairs_agreeing = (totals * (totals - 1)).sum()
    raw = float(pairs_agreeing / (sizes * (sizes - 1)).sum())
    unanimous = float((totals.max(axis=1) == sizes).mean())
    alpha = krippendorff_alpha(table)
    if np.isnan(alpha):
        return Agreement(units, reviews, raw, unanimous, None, None, None)
    rng = np.random.default_rng(seed)
    drawn: list[FloatArray] = []
    for start in range(0, resamples, _CHUNK):
        weights = rng.poisson(1.0, (min(_CHUNK, resamples - start), units)).astype(np.float64)
        drawn.append(_alpha(weights @ within, weights @ totals, weights @ sizes))
    spread = np.concatenate(drawn)
    low, high = np.nanquantile(spread, [0.025, 0.975]) if not np.isnan(spread).all() else (alpha, alpha)
    return Agreement(units, reviews, raw, unanimous, alpha, float(low), float(high))


def against_others(unit: IntArray, label: IntArray, table: IntArray) -> FloatArray:
    """For each review, the share of the unit's other reviews that give the same label; NaN where there are none."""
    others = table.sum(axis=1)[unit] - 1
    same = table[unit, label] - 1
    return np.divide(same, others, out=np.full(len(unit), np.nan), where=others > 0)


def _parts(table: IntArray) -> tuple[FloatArray, IntArray, IntArray]:
    """Agreeing weight of each unit, its counts and its size, for units with at least two reviews."""
    totals = table[table.sum(axis=1) >= 2]
    sizes = totals.sum(axis=1)
    within = (totals * (totals - 1)).sum(axis=1) / np.maximum(sizes - 1, 1)
    return within, totals, sizes


def _alpha(within: FloatArray, labels: FloatArray | IntArray, reviews: FloatArray) -> FloatArray:
    """Alpha from the agreeing weight, the label totals [n, labels] and the number of reviews."""
    n = np.atleast_1d(np.asarray(reviews, np.float64))
    squares = (np.asarray(labels, np.float64) ** 2).sum(axis=1)
    expected = n * n - squares
    with np.errstate(divide="ignore", invalid="ignore"):
        result = 1 - (n - 1) * (n - np.atleast_1d(within)) / expected
    return np.where(expected > 0, result, np.nan)
