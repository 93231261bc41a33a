"""Ship, hold or roll back: one stated rule that fails closed.

    roll back   a primary metric or a guard (sends per exposed unit, active share) is significantly below control
    ship        a primary metric is significantly above control, no primary metric or guard significantly below, no
                guard's interval reaches below -guard_pct, and every set involved is a bounded interval
    hold        anything else: no significant win, an unbounded or undefined set, a failed check, missing evidence

"Significantly" for a primary metric means Holm-adjusted over the arms and primary metrics; a guard is not adjusted,
because a missed harm costs more than a false alarm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from flywheel_tasks.release.analysis import METRICS, PRIMARY, Comparison

Verdict = Literal["ship", "hold", "roll back"]


class Decision(NamedTuple):
    arm: str
    verdict: Verdict
    reasons: list[str]


def decide(found: Sequence[Comparison], arm: str, problems: Sequence[str], alpha: float, guard_pct: float) -> Decision:
    """The verdict on one test arm."""
    if problems:
        return Decision(arm, "hold", [f"no readout: {p}" for p in problems])
    mine = {c.metric: c for c in found if c.arm == arm and c.segment == "all"}
    missing = [m for m in METRICS if m not in mine or mine[m].p is None or mine[m].lift.lift_pct is None]
    lost = [m for m in METRICS if m not in missing and _moved(mine[m], alpha) and _lift(mine[m]) < 0]
    if lost:
        return Decision(arm, "roll back", [f"{m} fell: {mine[m].lift}" for m in lost])
    if missing:
        return Decision(arm, "hold", [f"{m} has no lift" for m in missing])
    unbounded = [m for m in METRICS if mine[m].lift.kind != "bounded" and not _unchanged(mine[m])]
    if unbounded:
        return Decision(arm, "hold", [f"{m} has no bounded interval: {mine[m].lift}" for m in unbounded])
    doubtful = [m for m in METRICS if m not in PRIMARY and _lower(mine[m]) < -guard_pct]
    if doubtful:
        return Decision(
            arm, "hold", [f"{m} may have fallen by more than {guard_pct:g} %: {mine[m].lift}" for m in doubtful]
        )
    won = [m for m in PRIMARY if _moved(mine[m], alpha)]
    if won:
        return Decision(arm, "ship", [f"{m} rose: {mine[m].lift}" for m in won])
    return Decision(arm, "hold", ["no primary metric moved"])


def _moved(c: Comparison, alpha: float) -> bool:
    p = c.p_holm if c.metric in PRIMARY else c.p
    return p is not None and p < alpha and c.lift.significant


def _unchanged(c: Comparison) -> bool:
    """Exactly the same in both arms, such as an active share of one."""
    return c.lift.kind == "point" and c.lift.lift_pct == 0


def _lift(c: Comparison) -> float:
    return c.lift.lift_pct if c.lift.lift_pct is not None else 0.0


def _lower(c: Comparison) -> float:
    return c.lift.lift_pct_bounds[0] if c.lift.lift_pct_bounds else float("-inf")
