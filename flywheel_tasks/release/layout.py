"""The layout a daily ingest writes for the readout: units numbered once, one file per day sorted by that number.

`units.parquet` holds the population, one row per unit: its row number is its `unit_index`. `activity-DAY.parquet` holds
(unit_index, day, sends), one row per unit active that day, ascending. The readout then needs no ids, no hash table
and no random access, and a worker that reads one range of units skips the row groups of the others. Every file carries
the layout's stamp (`stamp`): files of two layouts, or of a layout and another log, are refused.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.release.parts import Part
from flywheel_tasks.release.population import Log, Population, populate, read_log
from flywheel_tasks.release.readout_config import ReadoutConfig
from flywheel_tasks.release.resolve import resolve_window, too_many_crossed
from flywheel_tasks.release.scan import Scan, scan
from flywheel_tasks.release.stamp import DENSE, Stamp, layout_id
from flywheel_tasks.release.units import hashed
from flywheel_tasks.release.window import day_of

SCHEMA = pa.schema(
    [pa.field(DENSE, pa.int32(), False), pa.field("day", pa.date32(), False), pa.field("sends", pa.int64(), False)]
)
_ROW_GROUP = 1 << 20
_UNITS = "units.parquet"


def write_layout(
    exposures: Sequence[Part], activity: Sequence[Part], config: ReadoutConfig, folder: Path
) -> Counter[str]:
    """Write the layout of one experiment and its window; returns where every row went.

    It is written beside the folder and then takes its place, so a folder never holds files of two layouts.
    """
    if config.estimand == "per_user_window":
        raise InputError("a layout holds calendar days: per_user_window reads the raw activity")
    _must_be_free(folder)
    log = read_log(exposures, config.experiment, (), config.naive_zone)
    resolved = resolve_window(log, activity, config)
    window = resolved.window
    population = populate(log, window, config.time_zone)
    if problem := too_many_crossed(population.rows, config.max_crossed):
        raise InputError(problem)
    cells = scan(activity, Scan(population, window, config.bad_rows), config.threads or os.cpu_count() or 1)
    slots, rows = _in_log_order(log, population)
    counts = log.rows + population.rows
    stamp = Stamp(
        layout_id(
            [log.words[rows], log.arm[rows], log.at[rows], cells.matrix],
            log.experiment, log.arms, window, config.time_zone,
        ),
        len(rows), window.first, window.days, window.pre_days, config.time_zone, str(resolved.as_of),
        {rule: n for rule, n in counts.items() if rule != "units"},
    )  # fmt: skip
    units = {
        "experiment": _names(np.zeros(len(rows), np.int32), [log.experiment]),
        "unit_id": _unit_ids(exposures, log.experiment).take(pa.array(rows)),
        "arm": _names(log.arm[rows], log.arms),
        "exposed_at": pa.array(log.at[rows], pa.timestamp("us", tz="UTC")),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
        new = Path(beside) / "new"
        new.mkdir()
        _write(pa.table(units), stamp, new / _UNITS)
        for column in range(window.columns):
            sends = cells.matrix[column][slots]
            active = np.flatnonzero(sends)
            table = pa.table(
                {
                    DENSE: pa.array(active.astype(np.int32)),
                    "day": pa.array(np.full(len(active), window.read_from + column, np.int32)).cast(pa.date32()),
                    "sends": pa.array(sends[active].astype(np.int64)),
                },
                schema=SCHEMA,
            )
            _write(table, stamp, new / f"activity-{day_of(window.read_from + column)}.parquet")
        if folder.exists():
            folder.rename(Path(beside) / "old")
        new.rename(folder)
    return counts + cells.rows


def _must_be_free(folder: Path) -> None:
    """Only an earlier layout may be replaced."""
    for path in folder.iterdir() if folder.exists() else ():
        if path.name != _UNITS and not path.match("activity-*.parquet"):
            raise InputError(f"{folder} holds {path.name}, which is no part of a layout: name a folder of its own")


def _write(table: pa.Table, stamp: Stamp, path: Path) -> None:
    pq.write_table(table.cast(stamp.on(table.schema)), path, row_group_size=_ROW_GROUP)


def _in_log_order(log: Log, population: Population) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the population's units and the log row of each one's first exposure, by arm, then by that row.

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
    return slots[order], row[slots][order]


def _unit_ids(exposures: Sequence[Part], experiment: str) -> pa.Array:
    tables = [part.open().read(columns=["unit_id", "experiment"]) for part in exposures]
    whole = pa.concat_tables(tables)
    mine = whole.filter(pc.equal(whole.column("experiment").cast(pa.string()), experiment))
    return pa.concat_arrays(mine.column("unit_id").chunks)


def _names(codes: NDArray[np.int32], names: list[str]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(names))
