"""Which days a readout reads, and whether they are all there: from the config, else from the data, never from a
clock."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow.compute as pc
import pyarrow.parquet as pq

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.release.parts import Part, need
from flywheel_tasks.release.population import Log, span
from flywheel_tasks.release.readout_config import ReadoutConfig
from flywheel_tasks.release.scan import check_types
from flywheel_tasks.release.stamp import read_stamp
from flywheel_tasks.release.window import Window, day_number, day_of


class Resolved(NamedTuple):
    """The window, the day before which data is complete, what was inferred, and the days of the window that are
    complete."""

    window: Window
    as_of: dt.date
    notes: list[str]
    complete: list[int]
    waits: str | None
    """Why the window can't be closed yet."""


def resolve_window(log: Log, activity: Sequence[Part], config: ReadoutConfig) -> Resolved:
    """Where the config is silent, the last day with activity may still be filling up, so it closes nothing."""
    first_day, last_day = activity_span(activity)
    start, notes = config.start, []
    if start is None:
        start = max(span(log, config.time_zone)[0], first_day + dt.timedelta(config.pre_days))
        notes.append(f"start was not given: {start} is the later of the first exposure and the first activity")
    as_of = config.as_of or last_day
    if config.as_of is None:
        why = "the last day with activity, which may be incomplete"
        notes.append(f"as_of was not given: data is complete before {as_of}, {why}")
    # An early as_of cuts the data; a late one can't add days that nobody has delivered.
    known = min(day_number(as_of), day_number(last_day) + 1)
    first, settled = day_number(start), known - config.settle_days
    skipped = frozenset((d - start).days for d in config.missing_days)
    if any(not 0 <= d < config.days for d in skipped) or len(skipped) == config.days:
        raise InputError(f"missing_days must name some, not all, of the {config.days} days from {start}")
    last = first + config.days - 1
    if config.estimand == "per_user_window":
        last = max(last, settled - 1)
    window = Window(first, config.days, last, config.pre_days, config.estimand, skipped)
    waits = None
    if window.last + 1 + config.settle_days > day_number(as_of):
        waits = f"the window ends on {day_of(window.last)}; data is complete before {as_of}"
        if first + window.kept[-1] <= day_number(last_day):
            closes = day_of(window.last + 1 + config.settle_days)
            waits += f"; if that of {day_of(window.last)} is whole, as_of {closes} closes it"
    elif first + window.kept[-1] >= known:
        waits = f"the window ends on {day_of(window.last)}; the activity ends on {last_day}"
    complete = [d for d in window.kept if first + d < settled]
    return Resolved(window, as_of, notes, complete, waits)


def too_many_crossed(rows: Counter[str], most: float) -> str | None:
    """The problem of units seen in two arms, where they are too many."""
    crossed = rows["units in two arms"]
    if crossed <= most * max(1, crossed + rows["units"]):
        return None
    return f"{crossed} units were seen in two arms, above max_crossed = {most:g} of the units"


def activity_span(parts: Sequence[Part]) -> tuple[dt.date, dt.date]:
    """First and last day of the activity, as its layout knows them or from the file statistics where there are some."""
    if stamp := read_stamp(parts[0]):
        return day_of(stamp.first), day_of(stamp.last)
    lows, highs = [], []
    for part in parts:
        file = part.open()
        need(file.schema_arrow, ["day", "sends"], part.path)
        check_types(file.schema_arrow, part.path)
        index = file.metadata.schema.names.index("day") if file.metadata.num_row_groups else 0
        for group in range(file.metadata.num_row_groups):
            low, high = _group_span(file, group, index)
            if low is not None:
                lows.append(low)
                highs.append(high)
    if not lows:
        raise InputError("the activity has no rows")
    return min(lows), max(highs)


def _group_span(file: pq.ParquetFile, group: int, index: int) -> tuple[Any, Any]:
    found = file.metadata.row_group(group).column(index).statistics
    if found is not None and found.has_min_max:
        return found.min, found.max
    both = pc.min_max(file.read_row_group(group, columns=["day"]).column(0).drop_null()).as_py()
    return both["min"], both["max"]
