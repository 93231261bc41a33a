"""Before launch: what lift an experiment can see, and how many units a lift needs.

Fieller's set excludes a lift of zero exactly when the z-test on the difference rejects, so the power is that of the
z-test.
"""

from __future__ import annotations

import math
from statistics import NormalDist

_N = NormalDist()


def power(lift: float, mean: float, sd: float, n_test: float, n_control: float, alpha: float = 0.05) -> float:
    """Chance that a true relative lift is declared, with the same user-level deviation in both arms."""
    if mean <= 0 or sd < 0 or n_test < 2 or n_control < 2 or not 0 < alpha < 1:
        raise ValueError("power needs a positive mean, a deviation, two units per arm and 0 < alpha < 1")
    se = sd * math.sqrt(1 / n_test + 1 / n_control)
    if se == 0:
        return 1.0 if lift else alpha
    shift, z = lift * mean / se, _N.inv_cdf(1 - alpha / 2)
    return _N.cdf(shift - z) + _N.cdf(-shift - z)


def minimum_detectable_lift(
    mean: float, sd: float, n_test: float, n_control: float, alpha: float = 0.05, wanted: float = 0.8
) -> float:
    """The smallest relative lift that is declared with the wanted power."""
    _attainable(wanted, alpha)
    if sd == 0:
        return 0.0
    low, high = 0.0, 1e-6
    while power(high, mean, sd, n_test, n_control, alpha) < wanted:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle, mean, sd, n_test, n_control, alpha) < wanted else (low, middle)
    return high


def units_per_arm(lift: float, mean: float, sd: float, alpha: float = 0.05, wanted: float = 0.8) -> int:
    """Units in each of two equal arms for a relative lift."""
    if lift == 0:
        raise ValueError("no number of units shows a lift of zero")
    _attainable(wanted, alpha)
    low, high = 2, 2
    while power(lift, mean, sd, high, high, alpha) < wanted:
        low, high = high, high * 2
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if power(lift, mean, sd, middle, middle, alpha) < wanted else (low, middle)
    return high


def _attainable(wanted: float, alpha: float) -> None:
    """A power of 1 or above is not reached with any number of units, and one of alpha or below with none at all."""
    if not alpha < wanted < 1:
        raise ValueError(f"power must lie between alpha and 1, not {wanted}")
