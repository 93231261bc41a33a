"""Planning before launch (`flywheel readout --plan`): baselines from past activity, power and minimum detectable
lift."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.release.analysis import METRICS, by_arm, metric_estimate
from flywheel_tasks.release.parts import Part, need
from flywheel_tasks.release.population import Log, populate
from flywheel_tasks.release.readout_config import ReadoutConfig
from flywheel_tasks.release.reduce import reduce_cells
from flywheel_tasks.release.resolve import activity_span
from flywheel_tasks.release.scan import Scan, check_types, scan
from flywheel_tasks.release.units import hashed, id_words
from flywheel_tasks.release.window import Window, day_number
from flywheel_tasks.stats.power import minimum_detectable_lift, units_per_arm

LIFTS = (0.005, 0.01, 0.02, 0.05)


@dataclass(frozen=True)
class Planned:
    """One metric: its baseline and what the experiment can see of it. Counts are exposed units per arm."""

    metric: str
    mean: float
    sd: float
    units_per_arm: int
    minimum_detectable_lift_pct: float
    units_for_lift_pct: dict[str, int]


@dataclass(frozen=True)
class Plan:
    first: str
    last: str
    units_seen: int
    share_per_arm: float
    alpha: float
    power: float
    tests: int
    metrics: list[Planned]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(
    activity: Sequence[Part],
    config: ReadoutConfig,
    share: float = 0.1,
    power: float = 0.8,
    tests: int = 2,
    units: int | None = None,
) -> Plan:
    """Plan from the last `config.days` days of activity. `tests` is the number of primary claims that share alpha
    (Bonferroni, which Holm never needs more than); `units` overrides share x the units seen."""
    if not 0 < share <= 0.5 or tests < 1:
        raise InputError(f"share per arm must lie in (0, 0.5] and tests be at least 1, not {share:g} and {tests}")
    if not config.alpha / tests < power < 1:
        raise InputError(f"power must lie above alpha / tests = {config.alpha / tests:g} and below 1, not {power:g}")
    last = (config.as_of - dt.timedelta(1)) if config.as_of else activity_span(activity)[1]
    first = config.start or last - dt.timedelta(config.days - 1)
    last = first + dt.timedelta(config.days - 1)
    log = _everyone(activity, first, last)
    window = Window(day_number(first), config.days, day_number(first) + config.days - 1, 0, "calendar_window")
    population = populate(log, window, "UTC")
    cells = scan(activity, Scan(population, window, config.bad_rows), config.threads or 1)
    named = by_arm(reduce_cells(cells, population, window))["all"]["baseline"]
    seen = named["sends"].n
    per_arm = units if units is not None else int(share * seen)
    if per_arm < 2:
        raise InputError(f"{per_arm} units per arm: give more activity, a larger share, or the number of units")
    found = []
    for metric in METRICS:
        e = metric_estimate(named, metric, window.scale)
        if not e.mean or e.se2 is None:
            raise InputError(f"the activity of {first} to {last} has no baseline for {metric}")
        sd, rate = math.sqrt(e.se2 * e.n), e.n / seen
        counted = max(2, int(per_arm * rate))
        needed = {
            f"{100 * x:g}": math.ceil(units_per_arm(x, e.mean, sd, config.alpha / tests, power) / rate) for x in LIFTS
        }
        mde = 100 * minimum_detectable_lift(e.mean, sd, counted, counted, config.alpha / tests, power)
        found.append(Planned(metric, e.mean, sd, per_arm, mde, needed))
    return Plan(str(first), str(last), seen, share, config.alpha, power, tests, found)


def _everyone(activity: Sequence[Part], first: dt.date, last: dt.date) -> Log:
    """Every unit with a send from first to last as one arm, exposed on the first day: an experiment of that length
    would expose these, not all who ever came."""
    words = []
    for part in activity:
        file = part.open()
        need(file.schema_arrow, ["unit_id", "day", "sends"], part.path)
        check_types(file.schema_arrow, part.path)
        for batch in file.iter_batches(1 << 19, columns=["unit_id", "day", "sends"]):
            day = batch.column("day").cast(pa.date32())
            there = pc.and_(pc.greater_equal(day, pa.scalar(first)), pc.less_equal(day, pa.scalar(last)))
            there = pc.and_(there, pc.greater(batch.column("sends"), 0))
            found = id_words(batch.column("unit_id").filter(there).drop_null())
            _, at = np.unique(hashed(found), return_index=True)
            words.append(found[at])
    words = [w for w in words if len(w)]
    if not words:
        raise InputError(f"no unit is active from {first} to {last}")
    width = max(w.shape[1] for w in words)
    if any(w.shape[1] != width for w in words):
        words = [np.insert(w, w.shape[1] - 1, np.zeros((width - w.shape[1], 1), np.uint64), axis=1) for w in words]
    whole = np.concatenate(words)
    _, at = np.unique(hashed(whole), return_index=True)
    whole, n = whole[at], len(at)
    instant = day_number(first) * 86_400_000_000
    return Log(whole, np.zeros(n, np.int32), np.full(n, instant, np.int64), (), ["baseline"], (), "plan")
