"""The z-test on a difference of means and the textbook intervals that stand beside Fieller's for comparison."""

from __future__ import annotations

import math
from statistics import NormalDist

from flywheel_tasks.stats.moments import Estimate

Bounds = tuple[float, float]


def critical(alpha: float) -> float:
    """z_{1 - alpha/2}."""
    return NormalDist().inv_cdf(1 - alpha / 2)


def z_statistic(test: Estimate, control: Estimate) -> float | None:
    """(mean_t - mean_c) over its standard error; None where a mean or a variance is missing. Without variance 0 or
    infinite."""
    if test.mean is None or control.mean is None or test.se2 is None or control.se2 is None:
        return None
    se = math.sqrt(test.se2 + control.se2)
    difference = test.mean - control.mean
    return difference / se if se > 0 else math.copysign(math.inf, difference) if difference else 0.0


def p_value(z: float | None) -> float | None:
    """Two-sided."""
    return None if z is None else math.erfc(abs(z) / math.sqrt(2))


def delta_lift_pct(test: Estimate, control: Estimate, alpha: float = 0.05) -> Bounds | None:
    """Symmetric interval of the lift from a first-order expansion of the ratio. Too narrow on one side when g is
    large."""
    if not _positive(test, control):
        return None
    ratio = test.mean / control.mean  # type: ignore[operator]
    se = math.sqrt(test.se2 + ratio**2 * control.se2) / control.mean  # type: ignore[operator]
    half = critical(alpha) * se
    return 100 * (ratio - half - 1), 100 * (ratio + half - 1)


def log_delta_lift_pct(test: Estimate, control: Estimate, alpha: float = 0.05) -> Bounds | None:
    """The same expansion on the log ratio, so the ratio stays positive."""
    if not _positive(test, control) or not test.mean:
        return None
    ratio = test.mean / control.mean  # type: ignore[operator]
    se = math.sqrt(test.se2 / test.mean**2 + control.se2 / control.mean**2)  # type: ignore[operator]
    half = critical(alpha) * se
    return 100 * math.expm1(math.log(ratio) - half), 100 * math.expm1(math.log(ratio) + half)


def _positive(test: Estimate, control: Estimate) -> bool:
    known = None not in (test.mean, test.se2, control.mean, control.se2)
    return known and bool(control.mean and control.mean > 0 and test.mean is not None and test.mean >= 0)
