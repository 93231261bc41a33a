"""From exact moments to breadth, depth, lifts and their Fieller sets (eq. 9-18), and what stands beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from flywheel_tasks.release.reduce import Totals, merge
from flywheel_tasks.release.window import Window, day_of
from flywheel_tasks.stats.compare import delta_lift_pct, log_delta_lift_pct, p_value, z_statistic
from flywheel_tasks.stats.cuped import Arm, cuped
from flywheel_tasks.stats.fieller import FiellerSet, fieller
from flywheel_tasks.stats.moments import Estimate, Moments, estimate
from flywheel_tasks.stats.multiplicity import benjamini_hochberg, holm
from flywheel_tasks.stats.sequential import equal_looks, obrien_fleming

PRIMARY = ("breadth", "depth")
METRICS = (*PRIMARY, "sends_per_exposed", "active_share")
SOURCE = {"breadth": "breadth", "depth": "depth", "sends_per_exposed": "sends", "active_share": "active"}

Bounds = tuple[float, float]
Named = dict[str, Moments]


@dataclass(frozen=True)
class Comparison:
    """One metric of one test arm against control."""

    metric: str
    arm: str
    segment: str
    test: Estimate
    control: Estimate
    lift: FiellerSet
    p: float | None
    p_holm: float | None = None
    p_bh: float | None = None
    delta_pct: Bounds | None = None
    log_delta_pct: Bounds | None = None


@dataclass(frozen=True)
class Look:
    """The cumulative metric up to a day, with the boundary that makes looking every day honest."""

    day: str
    metric: str
    arm: str
    on_day: FiellerSet
    through: FiellerSet
    z: float | None
    boundary: float
    crossed: bool


@dataclass(frozen=True)
class Cuped:
    metric: str
    arm: str
    lift: FiellerSet
    theta: float
    variance_kept: float


def by_arm(totals: Totals, position: int | None = None) -> dict[str, dict[str, Named]]:
    """{segment value: {arm: moments}}; without a position every segment is merged into one, named "all"."""
    out: dict[str, dict[str, Named]] = {}
    for group, named in totals.items():
        value = "all" if position is None else group[position]
        arms = out.setdefault(value, {})
        arms[group[0]] = merge([{("x",): arms[group[0]]}, {("x",): named}])[("x",)] if group[0] in arms else named
    return out


def metric_estimate(named: Named, metric: str, scale: int, at: str = "") -> Estimate:
    """The mean and its squared standard error (eq. 11, 13, 15). Depth: over active units, variance among them."""
    return estimate(named[SOURCE[metric] + at], scale if metric == "breadth" else 1)


def compare(
    arms: dict[str, Named], control: str, window: Window, alpha: float, segment: str = "all"
) -> list[Comparison]:
    """Every metric of every test arm, with p-values adjusted over arms and primary metrics."""
    found = []
    for arm in sorted(a for a in arms if a != control):
        for metric in METRICS:
            t, c = (metric_estimate(arms[a], metric, window.scale) for a in (arm, control))
            found.append(
                Comparison(
                    metric,
                    arm,
                    segment,
                    t,
                    c,
                    lift_of(t, c, alpha),
                    p_value(z_statistic(t, c)),
                    delta_pct=delta_lift_pct(t, c, alpha),
                    log_delta_pct=log_delta_lift_pct(t, c, alpha),
                )
            )
    return adjust(found)


def lift_of(t: Estimate, c: Estimate, alpha: float) -> FiellerSet:
    return fieller(t.mean, t.se2, c.mean, c.se2, alpha)


def adjust(found: Sequence[Comparison]) -> list[Comparison]:
    """Holm and Benjamini-Hochberg over the primary metrics of all arms and segments given."""
    family = [i for i, c in enumerate(found) if c.metric in PRIMARY and c.p is not None]
    p = [found[i].p or 0.0 for i in family]
    out = list(found)
    for i, by_holm, by_bh in zip(family, holm(p), benjamini_hochberg(p), strict=True):
        out[i] = replace(out[i], p_holm=by_holm, p_bh=by_bh)
    return out


def novelty(
    arms: dict[str, Named], control: str, window: Window, alpha: float, days: Sequence[int] | None = None
) -> list[Look]:
    """Per day: that day's lift alone, and the lift so far against O'Brien-Fleming's boundary (eq. 9-14 by day).

    `days` are those that are complete while the window is open; what the others will tell is not known yet, so the
    looks of the whole window are taken as equally spaced.
    """
    looks = []
    seen = window.kept if days is None else days
    for arm in sorted(a for a in arms if a != control) if seen else []:
        for metric in PRIMARY:
            pairs = [_through(arms, arm, control, metric, d, window) for d in seen]
            if days is None:
                fractions = information([_relative_variance(t, c) for t, c in pairs])
            else:
                fractions = equal_looks(len(window.kept))
            boundaries = obrien_fleming(fractions, alpha)[: len(seen)]
            for d, (t, c), boundary in zip(seen, pairs, boundaries, strict=True):
                z, today = z_statistic(t, c), _on_day(arms, arm, control, metric, d, alpha)
                crossed = z is not None and abs(z) >= boundary
                day = f"day {d + 1}" if window.relative else str(day_of(window.first + d))
                looks.append(Look(day, metric, arm, today, lift_of(t, c, alpha), z, boundary, crossed))
    return looks


def information(variances: Sequence[float | None]) -> list[float]:
    """Information fractions of cumulative looks from their variances; equal steps where a variance is missing."""
    looks = len(variances)
    floor = 0.01
    if any(not v for v in variances):
        return [(k + 1) / looks for k in range(looks)]
    raw = [variances[-1] / v for v in variances if v and variances[-1]]
    out: list[float] = []
    for k, value in enumerate(raw):
        lowest = (out[-1] if out else 0.0) + floor
        out.append(min(max(value, lowest), 1 - floor * (looks - 1 - k)))
    return out


def cuped_lifts(arms: dict[str, Named], control: str, window: Window, alpha: float) -> list[Cuped]:
    """Breadth and sends per exposed unit, adjusted by the pre-period; nothing without one."""
    out = []
    for arm in sorted(a for a in arms if a != control) if window.pre_days else []:
        for metric in ("breadth", "sends_per_exposed"):
            key = SOURCE[metric]
            sides = [Arm(arms[a][key], arms[a][f"x_{key}"], arms[a][f"xy_{key}"].total) for a in (arm, control)]
            adjusted = cuped(sides[0], sides[1], window.scale if metric == "breadth" else 1)
            if adjusted:
                lift = lift_of(adjusted.test, adjusted.control, alpha)
                out.append(Cuped(metric, arm, lift, adjusted.theta, adjusted.variance_kept))
    return out


def active_share_warnings(found: Sequence[Comparison]) -> list[str]:
    """Depth conditions on being active, which the treatment may change (eq. 12)."""
    return [
        f"arm '{c.arm}': the active share moved ({c.lift}), so depth compares different kinds of users; "
        "read sends_per_exposed beside it"
        for c in found
        if c.metric == "active_share" and c.lift.significant
    ]


def _through(
    arms: dict[str, Named], arm: str, control: str, metric: str, d: int, window: Window
) -> tuple[Estimate, Estimate]:
    at = "" if d == window.kept[-1] else f"@{d}"
    t, c = (metric_estimate(arms[a], metric, window.scale, at) for a in (arm, control))
    return t, c


def _relative_variance(t: Estimate, c: Estimate) -> float | None:
    """Variance of the log lift; its inverse is the information of a look."""
    if not t.mean or not c.mean or t.se2 is None or c.se2 is None:
        return None
    return t.se2 / t.mean**2 + c.se2 / c.mean**2


def _on_day(arms: dict[str, Named], arm: str, control: str, metric: str, d: int, alpha: float) -> FiellerSet:
    name = "day_active" if metric == "breadth" else "day_depth"
    return lift_of(estimate(arms[arm][f"{name}@{d}"]), estimate(arms[control][f"{name}@{d}"]), alpha)
