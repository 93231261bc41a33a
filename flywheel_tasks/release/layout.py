"""The layout that is written when the day's activity is in (`expose`), for readouts that are many times faster.

`units.parquet` holds the units of one experiment, one row each, without their ids and with no column but those of
its schema and the segments that were named: the row number is the `unit_index`. `activity-DAY.parquet` holds
(unit_index, day, sends), one row per unit active that day, ascending, in row groups that end where a block of units
ends. The readout then needs no ids, no hash table and no random access, and its window, zone and estimand stay free.
Every file carries the layout's stamp (`stamp`): files of two layouts, or of a layout and another log, are refused.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from flywheel_tasks.compute import session
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.release.parts import Part
from flywheel_tasks.release.population import Log, Population, first_values, populate, read_log, span
from flywheel_tasks.release.readout_config import ReadoutConfig
from flywheel_tasks.release.resolve import activity_span, too_many_crossed
from flywheel_tasks.release.scan import Scan, scan
from flywheel_tasks.release.stamp import DENSE, UNIT_BLOCK, Stamp, layout_id
from flywheel_tasks.release.units import hashed
from flywheel_tasks.release.window import Window, day_number, day_of

SCHEMA = pa.schema(
    [pa.field(DENSE, pa.int32(), False), pa.field("day", pa.date32(), False), pa.field("sends", pa.int64(), False)]
)
UNITS, DAYS = "units.parquet", "activity-*.parquet"


def write_layout(
    exposures: Sequence[Part], activity: Sequence[Part], config: ReadoutConfig, folder: Path
) -> Counter[str]:
    """Write the layout of one experiment, with the segments of `config`, and of all days of its activity; returns where
    every row went.

    It is written beside the folder and then takes its place, so a folder never holds files of two layouts.
    """
    _must_be_free(folder)
    log = read_log(exposures, config.experiment, config.columns, config.naive_zone)
    first, last = (day_number(day) for day in activity_span(activity))
    window = Window(first, last - first + 1, last, 0, "calendar_window")
    everyone = _everyone(log, window)
    if problem := too_many_crossed(everyone.rows, config.max_crossed):
        raise InputError(problem)
    cells = scan(activity, Scan(everyone, window, config.bad_rows), config.threads or session.cpus())
    slots, rows, segments = _in_log_order(log, everyone)
    counts = log.rows + everyone.rows
    stamp = Stamp(
        layout_id(
            [log.words[rows], log.arm[rows], log.at[rows], *segments, cells.matrix],
            log.experiment, log.arms, config.columns, log.segment_values, first, last,
        ),
        len(rows), first, last, {rule: n for rule, n in counts.items() if rule != "units"},
    )  # fmt: skip
    units = _units(log, rows, dict(zip(config.columns, segments, strict=True)))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
        new = Path(beside) / "new"
        new.mkdir()
        pq.write_table(units.cast(stamp.on(units.schema)), new / UNITS, row_group_size=UNIT_BLOCK)
        for day, sends in enumerate(cells.matrix, start=first):
            _write_day(day, sends[slots], stamp, new / f"activity-{day_of(day)}.parquet")
        if folder.exists():
            folder.rename(Path(beside) / "old")
        new.rename(folder)
    return counts + cells.rows


def _everyone(log: Log, window: Window) -> Population:
    """Every unit, with all its days: those before its exposure too, which a readout may use as a covariate."""
    until = max(window.last, day_number(span(log, "UTC")[1]))
    found = populate(log, replace(window, days=until - window.first + 1, last=until), "UTC")
    return replace(found, latest=np.iinfo(np.int32).min)


def _write_day(day: int, sends: NDArray[np.int32] | NDArray[np.int64], stamp: Stamp, path: Path) -> None:
    """The active units of one day, a row group for each block of units that has any."""
    with pq.ParquetWriter(path, stamp.on(SCHEMA)) as writer:
        for start in range(0, len(sends), UNIT_BLOCK):
            block = sends[start : start + UNIT_BLOCK]
            active = np.flatnonzero(block > 0)
            columns = [
                pa.array((active + start).astype(np.int32)),
                pa.array(np.full(len(active), day, np.int32)).cast(pa.date32()),
                pa.array(block[active].astype(np.int64)),
            ]
            if len(active):
                writer.write_table(pa.table(columns, schema=stamp.on(SCHEMA)))


def _must_be_free(folder: Path) -> None:
    """Only an earlier layout may be replaced."""
    for path in folder.iterdir() if folder.exists() else ():
        if path.name != UNITS and not path.match(DAYS):
            raise InputError(f"{folder} holds {path.name}, which is no part of a layout: name a folder of its own")


def _in_log_order(
    log: Log, population: Population
) -> tuple[NDArray[np.int64], NDArray[np.int64], tuple[NDArray[np.int32], ...]]:
    """Positions of the population's units, the log row of each one's first exposure and its segments, by arm, then by
    that row.

    With arms side by side a block of units has one group, and the sums need no gathering.
    """
    if population.table is None:
        raise InputError("the exposure log is a layout already")
    slot = population.table.find(hashed(log.words), log.words)
    late_first = np.argsort(-log.at, kind="stable")
    late_first = late_first[slot[late_first] >= 0]
    row = np.full(population.slots, -1, np.int64)
    row[slot[late_first]] = late_first
    slots = np.flatnonzero(population.group >= 0)
    order = np.lexsort((row[slots], log.arm[row[slots]].astype(np.int64)))
    slots, first = slots[order], row[slots][order]
    place = np.full(population.slots, -1, np.int64)
    place[slots] = np.arange(len(slots))
    unit = np.where(slot >= 0, place[slot], -1)
    tied = np.flatnonzero(unit >= 0)
    tied = tied[(log.at[tied] == log.at[first[unit[tied]]]) & (tied != first[unit[tied]])]
    return slots, first, first_values(log, first, unit[tied], tied)


def _units(log: Log, rows: NDArray[np.int64], segments: Mapping[str, NDArray[np.int32]]) -> pa.Table:
    """The units as a table of named columns only: whatever else the log says of a person stays there."""

    def texts(codes: NDArray[np.int32], names: Sequence[str]) -> pa.Array:
        return pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(names, pa.string()))

    columns = {
        "experiment": texts(np.zeros(len(rows), np.int32), [log.experiment]),
        "arm": texts(log.arm[rows], log.arms),
        "exposed_at": pa.array(log.at[rows], pa.timestamp("us", tz="UTC")),
    }
    named = zip(segments.items(), log.segment_values, strict=True)
    return pa.table(columns | {name: texts(codes, names) for (name, codes), names in named})
