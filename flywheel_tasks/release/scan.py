"""One pass over the activity: an exact matrix of sends, day by unit, for the units of a population.

Sums are integers and cells only ever grow, so the matrix is the same for any order of files, batches and threads. It
is held in 32 bits until the total of all sends could pass them: no cell can be larger than the total.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.release.parts import Part, need
from flywheel_tasks.release.population import Population
from flywheel_tasks.release.stamp import DENSE
from flywheel_tasks.release.units import hashed, values
from flywheel_tasks.release.window import Window, day_number, day_of

Matrix = NDArray[np.int32] | NDArray[np.int64]
BadRows = Literal["refuse", "drop"]


@dataclass
class Cells:
    """The matrix under construction and the rows that went into it or not."""

    matrix: Matrix
    rows: Counter[str] = field(default_factory=Counter)
    by_day: Counter[int] = field(default_factory=Counter)
    total: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, column: NDArray[np.int32], slot: NDArray[np.int64], sends: NDArray[np.int64]) -> None:
        """Add rows to their cells; the caller holds the lock."""
        if len(sends) == 0:
            return
        largest = int(sends.max())
        self.total += int(sends.sum()) if largest * len(sends) < 1 << 63 else sum(map(int, sends))
        if self.total >= 1 << 63:
            raise InputError("the sends of the window add up past 2^63: that is no count of messages")
        if self.total >= 1 << 31 and self.matrix.dtype == np.int32:
            self.matrix = self.matrix.astype(np.int64)
        values = sends.astype(self.matrix.dtype, copy=False)
        one_day = column[0] == column[-1] and bool((column == column[0]).all())
        if one_day and bool((slot[1:] > slot[:-1]).all()):
            row = self.matrix[column[0]]
            if int(slot[-1] - slot[0]) + 1 == len(slot):
                row[slot[0] : slot[-1] + 1] += values
            else:
                row[slot] += values
            return
        some = np.flatnonzero(values)
        flat = column[some].astype(np.int64)
        flat *= self.matrix.shape[1]
        flat += slot[some]
        np.add.at(self.matrix.reshape(-1), flat, values[some])


@dataclass(frozen=True)
class Scan:
    """What to read and how; the same for every thread."""

    population: Population
    window: Window
    bad_rows: BadRows = "refuse"
    part: tuple[int, int] = (0, 0)
    batch_rows: int = 1 << 18


def scan(parts: Sequence[Part], spec: Scan, threads: int = 1) -> Cells:
    """The matrix of the window from activity files in any order."""
    cells = Cells(np.zeros((spec.window.columns, spec.population.slots), np.int32))
    work = [(part, metadata, group) for part in parts for metadata, group in _row_groups(part, spec, cells)]
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(_read, part, metadata, group, spec, cells) for part, metadata, group in work]:
                done.result()
    else:
        for part, metadata, group in work:
            _read(part, metadata, group, spec, cells)
    return cells


def _row_groups(part: Part, spec: Scan, cells: Cells) -> list[tuple[pq.FileMetaData, int]]:
    """Row groups that may hold a day of the window (and, in a layout, a unit of this part), by their statistics."""
    file = part.open()
    schema, metadata = file.schema_arrow, file.metadata
    dense = spec.population.table is None
    need(schema, [DENSE if dense else "unit_id", "day", "sends"], part.path)
    check_types(schema, part.path)
    wanted = []
    at = (
        {metadata.row_group(0).column(i).path_in_schema: i for i in range(metadata.num_columns)}
        if metadata.num_row_groups
        else {}
    )
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group)
        days = rows.column(at["day"]).statistics
        if days is not None and days.has_min_max and pa.types.is_date32(schema.field("day").type):
            low, high = day_number(days.min), day_number(days.max)
            if high < spec.window.read_from or low > spec.window.last:
                if spec.part[0] == 0:
                    cells.rows["activity rows"] += rows.num_rows
                    cells.rows["outside the window"] += rows.num_rows
                continue
        if dense and spec.part[1]:
            units = rows.column(at[DENSE]).statistics
            start, stop = spec.population.offset, spec.population.offset + spec.population.slots
            if units is not None and units.has_min_max and (units.max < start or units.min >= stop):
                continue
        wanted.append((metadata, group))
    return wanted


def check_types(schema: pa.Schema, where: str) -> None:
    """Refuse days that are no dates and sends that are no integers."""
    day, sends = schema.field("day").type, schema.field("sends").type
    if not pa.types.is_date(day):
        raise InputError(f"{where}: column 'day' has type {day}: give dates")
    if not pa.types.is_integer(sends):
        raise InputError(f"{where}: column 'sends' has type {sends}: give integers")


def _read(part: Part, metadata: pq.FileMetaData, group: int, spec: Scan, cells: Cells) -> None:
    file = part.open(metadata=metadata)
    columns = [DENSE if spec.population.table is None else "unit_id", "day", "sends"]
    for batch in file.iter_batches(spec.batch_rows, row_groups=[group], columns=columns, use_threads=False):
        _add_batch(batch, spec, cells, f"{part.path} row group {group}")


def _add_batch(batch: pa.RecordBatch, spec: Scan, cells: Cells, where: str) -> None:
    rows: Counter[str] = Counter({"activity rows": batch.num_rows})
    batch = _good_rows(batch, spec, rows, where)
    if spec.part[0]:
        # A bad row belongs to no part; the first one counts it.
        rows = Counter({"activity rows": batch.num_rows})
    window, population = spec.window, spec.population
    unit, key, day, sends = _columns(batch, spec, rows)
    if len(day) and (int(day.min()) < window.read_from or int(day.max()) > window.last):
        inside = (day >= window.read_from) & (day <= window.last)
        rows["outside the window"] += int((~inside).sum())
        unit, key, day, sends = unit[inside], key[inside], day[inside], sends[inside]
    if window.skipped and len(day):
        present = ~np.isin(day, [window.first + d for d in window.skipped])
        rows["on a day declared missing"] += int((~present).sum())
        unit, key, day, sends = unit[present], key[present], day[present], sends[present]
    slot, day, sends = _slots(unit, key, day, sends, spec, rows)
    column = day - np.int32(window.read_from)
    if len(day) and (
        window.relative or int(day.min()) < max(population.latest, window.first if window.pre_days else 0)
    ):
        column, slot, sends = _by_exposure(column, day, slot, sends, spec, rows)
    rows["rows used"] += len(slot)
    tally = np.bincount(day - window.read_from, minlength=1) if window.relative and len(day) else ()
    with cells.lock:
        cells.rows.update(rows)
        cells.by_day.update({int(d): int(n) for d, n in enumerate(tally) if n})
        cells.add(column, slot, sends)


def _good_rows(batch: pa.RecordBatch, spec: Scan, rows: Counter[str], where: str) -> pa.RecordBatch:
    """Refuse or drop nulls and negative sends."""
    checks: list[tuple[str, pa.Array]] = []
    if sum(column.null_count for column in batch.columns):
        full = [pc.is_valid(column) for column in batch.columns]
        checks.append(("null unit, day or sends", pc.and_(pc.and_(full[0], full[1]), full[2])))
    lowest = pc.min(batch.column(2)).as_py()
    if lowest is not None and lowest < 0:
        checks.append(("negative sends", pc.fill_null(pc.greater_equal(batch.column(2), 0), True)))
    for what, good in checks:
        bad = len(good) - pc.sum(good).as_py()
        if spec.bad_rows == "refuse":
            raise InputError(f"{where}: {bad} rows with {what}; mend them, or set bad_rows=drop to leave them out")
    if not checks:
        return batch
    keep = checks[0][1]
    rows[checks[0][0]] += len(keep) - pc.sum(keep).as_py()
    for what, good in checks[1:]:
        both = pc.and_(keep, good)
        rows[what] += pc.sum(keep).as_py() - (pc.sum(both).as_py() or 0)
        keep = both
    return batch.filter(keep)


def _columns(
    batch: pa.RecordBatch, spec: Scan, rows: Counter[str]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.int32], NDArray[np.int64]]:
    """Unit words, their key (hash or number), days and sends of the rows that belong to this part."""
    ids, days, counts = batch.columns
    day, sends = values(days.cast(pa.date32()), np.int32), values(counts.cast(pa.int64()), np.int64)
    table, (number, bits) = spec.population.table, spec.part
    if table is None:
        key: NDArray[Any] = values(ids.cast(pa.int64()), np.int64) - spec.population.offset
        unit: NDArray[Any] = key
        mine = (key >= 0) & (key < spec.population.slots) if bits else None
    else:
        unit = table.read(ids)
        key = hashed(unit)
        mine = key >> np.uint64(64 - bits) == number if bits else None
        key = key << np.uint64(bits)
    if mine is None:
        return unit, key, day, sends
    rows["activity rows"] -= int((~mine).sum())
    return unit[mine], key[mine], day[mine], sends[mine]


def _slots(
    unit: NDArray[Any],
    key: NDArray[Any],
    day: NDArray[np.int32],
    sends: NDArray[np.int64],
    spec: Scan,
    rows: Counter[str],
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
    """Positions of the rows' units; rows of units outside the population are left out."""
    population = spec.population
    if population.table is None:
        slot = key
        if len(slot) and (int(slot.min()) < 0 or int(slot.max()) >= population.slots):
            raise InputError(
                f"a unit_index lies beyond the {population.slots} units of the layout: write the layout again"
            )
    else:
        slot = population.table.find(key, unit)
        known = slot >= 0
        if not known.all():
            rows["unit not exposed"] += int((~known).sum())
            slot, day, sends = slot[known], day[known], sends[known]
    if population.excluded:
        kept = population.group[slot] >= 0
        rows["unit left out of the population"] += int((~kept).sum())
        slot, day, sends = slot[kept], day[kept], sends[kept]
    return slot, day, sends


def _by_exposure(
    column: NDArray[np.int32],
    day: NDArray[np.int32],
    slot: NDArray[np.int64],
    sends: NDArray[np.int64],
    spec: Scan,
    rows: Counter[str],
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """Drop window days before the unit's exposure and pre-period days after it; count relative days where asked."""
    window = spec.window
    exposed = spec.population.exposed[slot]
    if window.relative:
        column = day - exposed + np.int32(window.pre_days)
        keep = (column >= 0) & (column < window.columns)
        early = column < 0 if window.pre_days else column < window.pre_days
        rows["before exposure"] += int(early.sum())
        rows["after the unit's own window"] += int((column >= window.columns).sum())
    else:
        before = (column >= window.pre_days) & (day < exposed)
        contaminated = (column < window.pre_days) & (day >= exposed)
        rows["before exposure"] += int(before.sum())
        rows["pre-period after exposure"] += int(contaminated.sum())
        keep = ~(before | contaminated)
    return column[keep], slot[keep], sends[keep]


def missing_days(by_day: Counter[int], window: Window) -> list[str]:
    """Calendar days without a single row, for windows whose columns are relative days."""
    span = range(window.pre_days, window.last - window.read_from + 1)
    return [str(day_of(window.read_from + d)) for d in span if not by_day[d]]
