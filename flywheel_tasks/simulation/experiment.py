"""Seven days of activity with a known effect of each arm on breadth and depth (Sec. 2.5.2, Equations 10 to 14)."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flywheel_tasks.core import schemas

WINDOW_DAYS = 7
_BETA = (0.6, 1.4)
_MOST_ACTIVE = 0.8
"""A unit is active on a day with chance 0.8 times a Beta(0.6, 1.4) draw, so a lift up to 25 % stays a probability."""
_MEAN_SENDS = 6.0


@dataclass(frozen=True)
class Effect:
    """Relative lifts of one arm over no treatment: 0.05 is +5 %."""

    breadth: float = 0.0
    depth: float = 0.0


@dataclass(frozen=True)
class ABTruth:
    """Expected breadth (active days a day) and depth (sends of a unit that was active at all) of every arm."""

    breadth: dict[str, float]
    depth: dict[str, float]


def ab_week(
    exposures: pa.Table, effects: Mapping[str, Effect], *, start: dt.date, seed: int, strangers: float = 0.05
) -> tuple[pa.Table, ABTruth]:
    """`activity` rows (only of days with sends) of every exposed unit for the 7 days from `start`, and of some units
    that were never exposed. The lifts are exact in expectation: depth is per active unit, and breadth alone changes who
    is active, so sends a day are scaled to make up for it."""
    arms = np.asarray(exposures["arm"].to_pylist())
    if unknown := sorted(set(arms) - set(effects)):
        raise ValueError(f"no effect given for arm {', '.join(unknown)}")
    if wild := [a for a, e in effects.items() if not (-1 < e.breadth <= 1 / _MOST_ACTIVE - 1 and e.depth > -0.5)]:
        raise ValueError(f"effect of arm {', '.join(wild)} can't be simulated: breadth -1 to 0.25, depth above -0.5")
    rng = np.random.default_rng([seed, 5])
    extra = int(strangers * len(arms))
    count = len(arms) + extra
    units = np.array(exposures["unit_id"].to_pylist() + [f"{i:032x}" for i in range(extra)])
    none = _active_mean(0.0)
    lift_of = {a: (1 + e.breadth, (1 + e.depth) * none / _active_mean(e.breadth)) for a, e in effects.items()}
    by_unit = np.array([lift_of[a] for a in arms] + [(1.0, 1.0)] * extra)
    active = rng.random((count, WINDOW_DAYS)) < (_MOST_ACTIVE * rng.beta(*_BETA, count) * by_unit[:, 0])[:, None]
    heavy = rng.lognormal(-0.5, 1.0, count)  # mean 1: a few units send most
    rate = np.maximum((1.0 + (_MEAN_SENDS - 1.0) * heavy) * by_unit[:, 1] - 1.0, 0.0)
    sends = active * (1 + rng.poisson(rate[:, None], active.shape))
    who, day = np.nonzero(sends)
    days = np.datetime64(start, "D") + day.astype("timedelta64[D]")
    table = pa.table({"unit_id": units[who], "day": days, "sends": sends[who, day]}).cast(schemas.ACTIVITY)
    breadth = {a: _MOST_ACTIVE * (1 + e.breadth) * _BETA[0] / sum(_BETA) for a, e in effects.items()}
    depth = {a: (1 + e.depth) * _MEAN_SENDS * _active_mean(0.0) for a, e in effects.items()}
    return table, ABTruth(breadth, depth)


def write_ab_week(
    path: str | Path, exposures: pa.Table, effects: Mapping[str, Effect], *, start: dt.date, seed: int
) -> ABTruth:
    """`ab_week` as a Parquet file."""
    table, truth = ab_week(exposures, effects, start=start, seed=seed)
    pq.write_table(table, path)
    return truth


def make_exposures(experiment: str, units: int, arms: Mapping[str, float], *, start: dt.date, seed: int) -> pa.Table:
    """Units assigned at random to arms, exposed during the day before `start`."""
    rng = np.random.default_rng([seed, 6])
    share = np.array(list(arms.values())) / sum(arms.values())
    midnight = np.datetime64(start, "us") - np.timedelta64(1, "D")
    columns = {
        "experiment": [experiment] * units,
        "unit_id": [f"{i + 2**64:032x}" for i in range(units)],
        "arm": np.array(list(arms))[rng.choice(len(arms), units, p=share)],
        "exposed_at": midnight + rng.integers(0, 86_400_000_000, units).astype("timedelta64[us]"),
    }
    return pa.table(columns).cast(schemas.EXPOSURE)


def _active_mean(lift: float) -> float:
    """E[active days] / P(any active day): mean active days of a unit that was active, from the moments of the Beta."""
    scale, (a, b) = _MOST_ACTIVE * (1 + lift), _BETA
    never = sum(math.comb(WINDOW_DAYS, k) * (-scale) ** k * _beta_moment(a, b, k) for k in range(WINDOW_DAYS + 1))
    return WINDOW_DAYS * scale * a / (a + b) / (1 - never)


def _beta_moment(a: float, b: float, k: int) -> float:
    return math.prod((a + r) / (a + b + r) for r in range(k))
