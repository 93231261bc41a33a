"""Small experiments written as Parquet, and a slow reference readout in plain Python."""

from __future__ import annotations

import datetime as dt
import json
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flywheel_tasks.release.readout_cli import read_out_files
from flywheel_tasks.release.readout_config import ReadoutConfig

Rows = list[Any]
START = dt.date(2026, 11, 2)
Exposure = tuple[Any, str, dt.datetime]
Activity = tuple[Any, dt.date, int]


def at(day: int, hour: int = 12) -> dt.datetime:
    return dt.datetime.combine(START, dt.time(hour), dt.UTC) + dt.timedelta(days=day)


def day(n: int) -> dt.date:
    return START + dt.timedelta(days=n)


def world(
    seed: int, units: int = 400, text: bool = False, staggered: bool = True, pre: int = 0
) -> tuple[list[Exposure], list[Activity]]:
    """Units of two arms first exposed on days 0 to 4, several rows a day, and activity of strangers."""
    rng = random.Random(seed)
    name = (lambda i: f"user-{i * 7919:x}") if text else (lambda i: i * 7919 - 10**6)
    exposures: list[Exposure] = []
    activity: list[Activity] = []
    for i in range(units):
        arm = "test" if i % 2 else "control"
        first = rng.randrange(5) if staggered else 0
        exposures.append((name(i), arm, at(first, rng.randrange(24))))
        for d in range(-pre, 14):
            count, most = rng.choice([0, 1, 1, 2]), 9 + (arm == "test")
            activity += [(name(i), day(d), rng.randrange(most)) for _ in range(count)]
    activity += [(name(units + i), day(i % 7), 3) for i in range(50)]
    rng.shuffle(exposures)
    rng.shuffle(activity)
    return exposures, activity


def write(
    folder: Path,
    exposures: Sequence[Exposure],
    activity: Sequence[Activity],
    files: int = 1,
    extra: dict[str, list[Any]] | None = None,
) -> tuple[str, str]:
    """Write both tables; returns the two globs."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, rows in (("exposures", exposures), ("activity", activity)):
        for f in range(files):
            mine = rows[f::files]
            table = exposure_table(mine) if kind == "exposures" else activity_table(mine)
            for column, cells in (extra or {}).items() if kind == "exposures" else ():
                table = table.append_column(column, pa.array(cells[f::files]))
            pq.write_table(table, folder / f"{kind}-{f}.parquet", row_group_size=500)
    return str(folder / "exposures-*.parquet"), str(folder / "activity-*.parquet")


def exposure_table(rows: Sequence[Exposure]) -> pa.Table:
    return pa.table(
        {
            "experiment": ["x"] * len(rows),
            "unit_id": [r[0] for r in rows],
            "arm": [r[1] for r in rows],
            "exposed_at": pa.array([r[2] for r in rows], pa.timestamp("us", tz="UTC")),
        }
    )


def activity_table(rows: Sequence[Activity]) -> pa.Table:
    return pa.table(
        {
            "unit_id": [r[0] for r in rows],
            "day": pa.array([r[1] for r in rows], pa.date32()),
            "sends": [r[2] for r in rows],
        }
    )


def reference(
    exposures: Sequence[Exposure], activity: Sequence[Activity], estimand: str, days: int = 7, last: int = 6
) -> dict[str, Any]:
    """{arm: {metric: (n, mean, se2)}} straight from eq. 9-15, one unit at a time."""
    first: dict[Any, tuple[dt.datetime, str]] = {}
    arms = defaultdict(set)
    for unit, arm, when in exposures:
        arms[unit].add(arm)
        first[unit] = min(first.get(unit, (when, arm)), (when, arm))
    cells: dict[Any, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for unit, when, sends in activity:
        cells[unit][(when - START).days] += sends
    outcomes: dict[str, dict[str, list[Fraction]]] = defaultdict(lambda: defaultdict(list))
    for unit, (when, arm) in first.items():
        exposed = (when.date() - START).days
        if len(arms[unit]) > 1 or exposed >= days:
            continue
        if estimand == "per_user_window":
            window = range(exposed, exposed + days)
            if exposed < 0 or window[-1] > last:
                continue
        else:
            window = range(max(exposed, 0), days)
        size = days if estimand != "days_since_exposure" else len(window)
        sends = [cells[unit][d] for d in window]
        total = sum(sends)
        mine = outcomes[arm]
        mine["breadth"].append(Fraction(sum(s > 0 for s in sends), size))
        mine["sends_per_exposed"].append(Fraction(total))
        mine["active_share"].append(Fraction(total > 0))
        if total > 0:
            mine["depth"].append(Fraction(total))
    return {arm: {m: _estimate(values) for m, values in found.items()} for arm, found in outcomes.items()}


def _estimate(values: list[Fraction]) -> tuple[int, float, float]:
    n = len(values)
    mean = sum(values) / n
    return n, float(mean), float(sum((v - mean) ** 2 for v in values) / (n - 1) / n)


def settings(**more: Any) -> ReadoutConfig:
    return ReadoutConfig(**({"start": START} | more))


def strip(result: Any) -> str:
    return json.dumps(result.as_json(), sort_keys=True)


def tweak(change: Callable[[Rows, Rows], tuple[Rows, Rows]], tmp_path: Path, **more: Any) -> Any:
    exposures, activity = change(*world(8, staggered=False))
    return read_out_files(*write(tmp_path, exposures, activity), settings(**more))
