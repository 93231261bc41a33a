"""Sample-ratio check: were units split as planned? A failed check voids every lift (Sec. 2.5.2, randomised
assignment)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class SampleRatio(NamedTuple):
    chi2: float
    p: float
    observed: dict[str, int]
    expected: dict[str, float]


def sample_ratio(observed: Mapping[str, int], weights: Mapping[str, float]) -> SampleRatio:
    """Pearson's chi-squared test of the arms' sizes against their planned shares."""
    from scipy.special import chdtrc

    if set(observed) != set(weights) or any(w <= 0 for w in weights.values()):
        raise ValueError("every arm needs one positive weight")
    total, whole = sum(observed.values()), sum(weights.values())
    if total == 0:
        raise ValueError("no unit in any arm")
    expected = {arm: total * w / whole for arm, w in weights.items()}
    statistic = sum((observed[a] - e) ** 2 / e for a, e in expected.items())
    return SampleRatio(statistic, float(chdtrc(len(observed) - 1, statistic)), dict(observed), expected)
