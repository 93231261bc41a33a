"""Is the activity of single days there? A missing or half-delivered day would move every metric."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from flywheel_tasks.release.window import Window, day_of
from flywheel_tasks.stats.compare import p_value, z_statistic
from flywheel_tasks.stats.moments import Moments, estimate

Named = dict[str, Moments]


def day_problems(
    arms: dict[str, Named], window: Window, days: Sequence[int], partial_share: float
) -> tuple[list[str], list[str]]:
    """Problems and warnings of single days: no activity in an arm, or far less than the days around let expect.

    A day without an active unit is missing if chance could not empty it: (1 - share)^units < 1e-6, where share is
    the arm's usual active share. A small experiment may have an empty day; it gets a warning.
    """
    problems: list[str] = []
    warnings: list[str] = []
    found = {arm: [_share(named[f"day_active@{d}"]) for d in days] for arm, named in sorted(arms.items())}
    usual = max((median(shares) for shares in found.values() if shares), default=0.0)
    for arm, shares in found.items():
        for at, (d, share) in enumerate(zip(days, shares, strict=True)):
            units = arms[arm][f"day_active@{d}"].n
            day = f"day {d + 1} after exposure" if window.relative else str(day_of(window.first + d))
            if share == 0 and units:
                missing = (1 - usual) ** units < 1e-6 or usual == 0
                (problems if missing else warnings).append(f"{day} has no active unit in arm '{arm}'")
                continue
            least = 0.0 if window.relative else expected(shares, at)
            if units * least >= 100 and share < partial_share * least:
                problems.append(f"{day} has {share:.1%} active units in arm '{arm}', {least:.1%} is usual: late data?")
    return problems, warnings


def expected(shares: Sequence[float], at: int) -> float:
    """The active share that a day has at least when its data is whole.

    Retention falls fast after exposure, then ever slower: no day lies far below a later one, nor far below what the
    fall of the day before, continued, would leave.
    """
    later = max(shares[at + 1 :], default=0.0)
    if at < 2 or not shares[at - 2]:
        return later
    return max(later, shares[at - 1] * min(1.0, shares[at - 1] / shares[at - 2]))


def pre_period_problems(arms: dict[str, Named], control: str, window: Window, p_least: float) -> list[str]:
    """Days of the pre-period on which the arms differ. They are the same users before they were split, so a difference
    that chance can't make is a hole in the data, and a covariate with a hole moves the effect."""
    problems = []
    for day in range(window.pre_days):
        name = f"pre_active@{day}"
        for arm in sorted(a for a in arms if a != control):
            t, c = (estimate(arms[a][name]) for a in (arm, control))
            p = p_value(z_statistic(t, c))
            if p is not None and p < p_least / window.pre_days:
                problems.append(
                    f"{day_of(window.read_from + day)}: {_share(arms[arm][name]):.1%} of arm '{arm}' and "
                    f"{_share(arms[control][name]):.1%} of '{control}' were active before the window (p = {p:.2g})"
                )
    return problems


def _share(active: Moments) -> float:
    """Active share among the units exposed by then."""
    return active.total / active.n if active.n else 0.0
