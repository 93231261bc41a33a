"""CUPED: the same effect with less noise, by regression on a covariate measured before exposure.

Only for outcomes over all exposed units. Depth conditions on being active, which treatment may change, so its
covariate need not be balanced between the arms and the adjustment would move the effect itself.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from flywheel_tasks.stats.moments import Estimate, Moments


class Adjusted(NamedTuple):
    test: Estimate
    control: Estimate
    theta: float
    variance_kept: float
    """Variance of the adjusted outcome over that of the outcome, pooled over the arms: 1 - correlation^2."""


class Arm(NamedTuple):
    """Exact moments of outcome and covariate over the same units; `product` is the sum of their products."""

    y: Moments
    x: Moments
    product: int


def cuped(test: Arm, control: Arm, scale: int = 1) -> Adjusted | None:
    """Adjusted estimates of outcome / scale; None where the covariate doesn't vary or an arm has fewer than two
    units."""
    arms = (test, control)
    if min(a.y.n for a in arms) < 2:
        return None
    sxx, sxy, syy = (sum(parts, Fraction(0)) for parts in zip(*(_scatter(a) for a in arms), strict=True))
    if sxx == 0 or syy == 0:
        return None
    theta = sxy / sxx
    centre = Fraction(sum(a.x.total for a in arms), sum(a.x.n for a in arms))
    estimates = [_adjust(a, theta, centre, scale) for a in arms]
    kept = float((syy - theta * sxy) / syy)
    return Adjusted(estimates[0], estimates[1], float(theta / scale), kept)


def _scatter(arm: Arm) -> tuple[Fraction, Fraction, Fraction]:
    """Within-arm sums of squares and products about the means."""
    n = arm.y.n
    xx = Fraction(n * arm.x.squares - arm.x.total**2, n)
    xy = Fraction(n * arm.product - arm.x.total * arm.y.total, n)
    yy = Fraction(n * arm.y.squares - arm.y.total**2, n)
    return xx, xy, yy


def _adjust(arm: Arm, theta: Fraction, centre: Fraction, scale: int) -> Estimate:
    n = arm.y.n
    xx, xy, yy = _scatter(arm)
    mean = Fraction(arm.y.total, n) - theta * (Fraction(arm.x.total, n) - centre)
    se2 = (yy - 2 * theta * xy + theta * theta * xx) / ((n - 1) * n)
    return Estimate(n, float(mean / scale), float(se2 / (scale * scale)))
