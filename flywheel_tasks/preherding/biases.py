"""What a user signal rewards beside quality: the biases of Sec. 3.5.5, measured on labels and on a model's predictions.

They are why a signal may rank candidates but never reward RL: a policy finds such shortcuts at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
FEWEST = 5
"""Positives and negatives each, below which a rate of the minority says nothing."""


def auc(label: Floats, score: Floats) -> float | None:
    """P(a positive scores above a negative), ties half; None where one of the two kinds is too rare."""
    from scipy.stats import rankdata

    positive = label == 1
    n1, n0 = int(positive.sum()), int((label == 0).sum())
    if min(n1, n0) < FEWEST:
        return None
    ranks = rankdata(score)
    return float((ranks[positive].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def rates(label: Floats, groups: NDArray[np.object_]) -> dict[str, dict[str, float]]:
    """Positive rate and count of each group: ratios that differ between JTBDs invite a shortcut."""
    names, at = np.unique(groups.astype(str), return_inverse=True)
    count = np.bincount(at)
    share = np.bincount(at, weights=label) / count
    return {str(name): {"rate": float(r), "n": int(n)} for name, r, n in zip(names, share, count, strict=True)}


def measured(
    label: Floats,
    score: Floats,
    *,
    is_last: NDArray[np.bool_],
    words: Floats,
    jtbd: NDArray[np.object_],
    earlier: Floats,
) -> dict[str, Any]:
    """The four biases for one signal. `earlier` is the signal on the response before (NaN where there is none).

    ending     how much more often the signal comes on the last response; the model's score likewise
    verbosity  rank correlation with the response's length
    jtbd       AUC that the JTBD's positive rate alone reaches, beside the model's AUC inside JTBDs
    context    rank correlation with the signal on the response before
    """
    known = np.isfinite(label) & np.isfinite(score)
    label, score, last, words, jtbd, earlier = (a[known] for a in (label, score, is_last, words, jtbd, earlier))
    before = np.isfinite(earlier)
    by_jtbd = rates(label, jtbd)
    shortcut = np.array([by_jtbd[str(name)]["rate"] for name in jtbd])
    return {
        "n": len(label),
        "ending": {
            "label_last": _mean(label[last]),
            "label_earlier": _mean(label[~last]),
            "score_last": _mean(score[last]),
            "score_earlier": _mean(score[~last]),
        },
        "verbosity": {"label": _rank_correlation(label, words), "score": _rank_correlation(score, words)},
        "jtbd": {
            "rates": by_jtbd,
            "auc_of_jtbd_alone": auc(label, shortcut),
            "auc_within": _within(label, score, jtbd),
        },
        "context": {
            "label": _rank_correlation(label[before], earlier[before]),
            "score": _rank_correlation(score[before], earlier[before]),
        },
    }


def _within(label: Floats, score: Floats, jtbd: NDArray[np.object_]) -> float | None:
    """AUC averaged over JTBDs by their pairs: what is left when the JTBD gives nothing away."""
    total, weight = 0.0, 0.0
    for name in np.unique(jtbd.astype(str)):
        rows = jtbd.astype(str) == name
        area = auc(label[rows], score[rows])
        if area is not None:
            pairs = float((label[rows] == 1).sum() * (label[rows] == 0).sum())
            total, weight = total + area * pairs, weight + pairs
    return total / weight if weight else None


def _mean(values: Floats) -> float | None:
    return float(values.mean()) if values.size else None


def _rank_correlation(a: Floats, b: Floats) -> float | None:
    from scipy.stats import spearmanr

    if a.size < 2 * FEWEST or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(spearmanr(a, b).statistic)
