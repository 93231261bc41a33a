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
from typing import Any, Literal, NamedTuple

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
        """Add rows to their cells."""
        if len(sends) == 0:
            return
        largest = int(sends.max())
        total = int(sends.sum()) if largest * len(sends) < 1 << 63 else sum(map(int, sends))
        one_day = column[0] == column[-1] and bool((column == column[0]).all())
        if one_day and bool((slot[1:] > slot[:-1]).all()):
            side_by_side = int(slot[-1] - slot[0]) + 1 == len(slot)
            at: slice | NDArray[np.int64] = slice(int(slot[0]), int(slot[-1]) + 1) if side_by_side else slot
            with self.lock:
                self._count(total)
                self.matrix[column[0]][at] += sends.astype(self.matrix.dtype, copy=False)
            return
        some = np.flatnonzero(sends != 0)
        at, sends = slot[some], sends[some]
        if not one_day:
            at += column[some].astype(np.int64) * self.matrix.shape[1]
        with self.lock:
            self._count(total)
            cells = self.matrix[column[0]] if one_day else self.matrix.reshape(-1)
            np.add.at(cells, at, sends.astype(self.matrix.dtype, copy=False))

    def _count(self, total: int) -> None:
        """Count towards the total, and widen the cells before one of them could overflow."""
        self.total += total
        if self.total >= 1 << 63:
            raise InputError("the sends of the window add up past 2^63: that is no count of messages")
        if self.total >= 1 << 31 and self.matrix.dtype == np.int32:
            self.matrix = self.matrix.astype(np.int64)


@dataclass(frozen=True)
class Scan:
    """What to read and how; the same for every thread."""

    population: Population
    window: Window
    bad_rows: BadRows = "refuse"
    part: tuple[int, int] = (0, 0)
    batch_rows: int = 1 << 17


class Group(NamedTuple):
    """A row group to read; in a layout it holds units `low` to `high`."""

    part: Part
    metadata: pq.FileMetaData
    number: int
    low: int
    high: int


def scan(parts: Sequence[Part], spec: Scan, threads: int = 1) -> Cells:
    """The matrix of the window from activity files in any order."""
    groups, rows = row_groups(parts, spec)
    cells = Cells(np.zeros((spec.window.columns, spec.population.slots), np.int32), rows)
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(read_group, group, spec, cells) for group in groups]:
                done.result()
    else:
        for group in groups:
            read_group(group, spec, cells)
    return cells


def row_groups(parts: Sequence[Part], spec: Scan) -> tuple[list[Group], Counter[str]]:
    """Row groups that may hold a day of the window (and, in a layout, a unit of this part), by their statistics, and
    the rows of those that can't."""
    rows = Counter[str]()
    return [group for part in parts for group in _row_groups(part, spec, rows)], rows


def _row_groups(part: Part, spec: Scan, counted: Counter[str]) -> list[Group]:
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
    for group in part.groups(metadata):
        rows = metadata.row_group(group)
        days = rows.column(at["day"]).statistics
        known = days is not None and days.has_min_max and days.has_null_count and not days.null_count
        if known and pa.types.is_date32(schema.field("day").type):
            low, high = day_number(days.min), day_number(days.max)
            if high < spec.window.read_from or low > spec.window.last:
                if spec.part[0] == 0:
                    counted["activity rows"] += rows.num_rows
                    counted["outside the window"] += rows.num_rows
                continue
        span = (0, 0)
        if dense:
            units = rows.column(at[DENSE]).statistics
            if units is None or not units.has_min_max:
                raise InputError(f"{part.path} says nothing of the units in its row groups: write the layout again")
            span = (units.min, units.max)
            start, stop = spec.population.offset, spec.population.offset + spec.population.slots
            if not spec.part[1] and not start <= span[0] <= span[1] < stop:
                raise InputError(
                    f"{part.path}: a unit_index lies beyond the {stop} units of the layout: write the layout again"
                )
            if span[1] < start or span[0] >= stop:
                continue
        wanted.append(Group(part, metadata, group, *span))
    return wanted


def check_types(schema: pa.Schema, where: str) -> None:
    """Refuse days that are no dates and sends that are no integers."""
    day, sends = schema.field("day").type, schema.field("sends").type
    if not pa.types.is_date(day):
        raise InputError(f"{where}: column 'day' has type {day}: give dates")
    if not pa.types.is_integer(sends):
        raise InputError(f"{where}: column 'sends' has type {sends}: give integers")


def read_group(group: Group, spec: Scan, cells: Cells) -> None:
    """Add one row group's rows of the units that are asked for."""
    file = group.part.open(metadata=group.metadata)
    columns = [DENSE if spec.population.table is None else "unit_id", "day", "sends"]
    for batch in file.iter_batches(spec.batch_rows, row_groups=[group.number], columns=columns, use_threads=False):
        _add_batch(batch, spec, cells, f"{group.part.path} row group {group.number}")


def _add_batch(batch: pa.RecordBatch, spec: Scan, cells: Cells, where: str) -> None:
    rows: Counter[str] = Counter({"activity rows": batch.num_rows})
    batch = good_rows(in_window(batch, spec.window, rows), spec.bad_rows, rows, where)
    if spec.part[0]:
        # A row outside the window, or a bad one, belongs to no part; the first one counts it.
        rows = Counter({"activity rows": batch.num_rows})
    window, population = spec.window, spec.population
    unit, key, day, sends = _columns(batch, spec, rows)
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


def in_window(batch: pa.RecordBatch, window: Window, rows: Counter[str]) -> pa.RecordBatch:
    """Rows outside the window are not looked at, whatever else they hold and however the files are cut; a row without
    a day stays, to be judged."""
    column = batch.column(1).cast(pa.date32())
    if column.null_count:
        first, last = (pa.scalar(day_of(n)) for n in (window.read_from, window.last))
        keep = pc.fill_null(pc.and_(pc.greater_equal(column, first), pc.less_equal(column, last)), True)
    else:
        day = values(column, np.int32)
        if not len(day) or (int(day.min()) >= window.read_from and int(day.max()) <= window.last):
            return batch
        keep = pa.array((day >= window.read_from) & (day <= window.last))
    kept = batch.filter(keep)
    rows["outside the window"] += batch.num_rows - kept.num_rows
    return kept


def good_rows(batch: pa.RecordBatch, bad_rows: BadRows, rows: Counter[str], where: str) -> pa.RecordBatch:
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
        if bad_rows == "refuse":
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
        mine: NDArray[np.bool_] | None = (key >= 0) & (key < spec.population.slots)
    else:
        unit = table.read(ids)
        key = hashed(unit)
        mine = key >> np.uint64(64 - bits) == number if bits else None
        key = key << np.uint64(bits)
    if mine is None or bool(mine.all()):
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
