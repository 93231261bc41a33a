"""The readout window and the three estimands over it (Sec. 2.5.2, eq. 9): which days of which unit count."""

from __future__ import annotations

import datetime as dt
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Estimand = Literal["calendar_window", "days_since_exposure", "per_user_window"]

MEANING: dict[Estimand, str] = {
    "calendar_window": "every unit counts over all {days} days; those before its first exposure are inactive",
    "days_since_exposure": "a unit counts from its first exposure to the window's end; breadth divides by those days",
    "per_user_window": "a unit counts over {days} days from its first exposure; it is left out until they are complete",
}
EPOCH = dt.date(1970, 1, 1)


def day_number(day: dt.date) -> int:
    return (day - EPOCH).days


def day_of(number: int) -> dt.date:
    return EPOCH + dt.timedelta(days=number)


@dataclass(frozen=True, slots=True)
class Window:
    """Days are numbers since 1970-01-01. `last` is the last day of data that may be read."""

    first: int
    days: int
    last: int
    pre_days: int
    estimand: Estimand
    skipped: frozenset[int] = frozenset()
    """Days of the window, counted from 0, that were declared missing: they leave every sum and every denominator."""

    @property
    def kept(self) -> list[int]:
        return [d for d in range(self.days) if d not in self.skipped]

    @property
    def columns(self) -> int:
        """Columns of the unit-by-day matrix: the pre-period, then the window."""
        return self.pre_days + self.days

    @property
    def read_from(self) -> int:
        return self.first - self.pre_days

    @property
    def relative(self) -> bool:
        """Whether a column is a day since the unit's own exposure, not a calendar day."""
        return self.estimand == "per_user_window"

    @property
    def scale(self) -> int:
        """Common multiple of every denominator of eq. 9, so that breadth stays an integer."""
        return math.lcm(*range(1, len(self.kept) + 1)) if self.estimand == "days_since_exposure" else len(self.kept)

    def eligible(self, exposed: NDArray[np.int32]) -> tuple[NDArray[np.bool_], str]:
        """Which units belong to the population by their day of first exposure, and why the others don't."""
        if self.relative:
            return (exposed >= self.first) & (
                exposed + self.days - 1 <= self.last
            ), "own window not complete or not in range"
        return exposed <= self.first + self.kept[-1], "first exposed after the window"

    def observable(self, exposed: NDArray[np.int32], through: int) -> NDArray[np.int64]:
        """|D_i| up to day `through` of the window: the days over which eq. 9 averages for each unit."""
        if self.estimand != "days_since_exposure":
            return np.full(len(exposed), len(self.kept), np.int64)
        since = np.clip(exposed - self.first, 0, self.days - 1)
        left = np.array([sum(d <= k <= through for k in self.kept) for d in range(self.days)], np.int64)
        return left[since]

    def describe(self) -> str:
        span = f"{day_of(self.first)} to {day_of(self.last if self.relative else self.first + self.days - 1)}"
        without = "".join(f", without {day_of(self.first + d)}" for d in sorted(self.skipped))
        return f"{self.estimand}, {span}{without}: {MEANING[self.estimand].format(days=len(self.kept))}"
