"""The exact sums of a population: over one matrix for raw activity, block by block for a layout.

A layout has its units in order, and its row groups end where a block of units ends. So a thread takes a block, reads
the seven row groups that hold it into a matrix that fits the cache, reduces it and forgets it: memory stays flat
however many units there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from flywheel_tasks.release.parts import Part
from flywheel_tasks.release.population import Population
from flywheel_tasks.release.reduce import Totals, merge, reduce_cells
from flywheel_tasks.release.scan import Cells, Group, Scan, read_group, row_groups, scan
from flywheel_tasks.release.stamp import UNIT_BLOCK

Sums = tuple[Totals, Counter[str], Counter[int]]


def sums(activity: Sequence[Part], spec: Scan, threads: int) -> Sums:
    """Moments per group, where the rows went, and rows per day."""
    if spec.population.table is None:
        return _by_block(activity, spec, threads)
    cells = scan(activity, spec, threads)
    return reduce_cells(cells, spec.population, spec.window, threads), cells.rows, cells.by_day


def _by_block(activity: Sequence[Part], spec: Scan, threads: int) -> Sums:
    groups, rows = row_groups(activity, spec)
    whole = spec.population
    # Blocks begin at multiples of their size, wherever a part of the layout begins.
    ends = range(whole.offset // UNIT_BLOCK * UNIT_BLOCK, whole.offset + whole.slots, UNIT_BLOCK)
    bounds = [(max(at, whole.offset), min(at + UNIT_BLOCK, whole.offset + whole.slots)) for at in ends]

    widest = max((stop - start for start, stop in bounds), default=0)

    def blocks(mine: Sequence[tuple[int, int]]) -> Sums:
        """Block after block in one piece of memory."""
        room = np.empty(spec.window.columns * widest, np.int32)
        totals, seen, by_day = [], Counter[str](), Counter[int]()
        for start, stop in mine:
            # Where the whole is read in parts, only the first one counts rows that belong to no unit.
            here = replace(spec, population=_between(whole, start, stop), part=(spec.part[0] or start, 1))
            cells = Cells(room[: spec.window.columns * (stop - start)].reshape(spec.window.columns, -1))
            cells.matrix.fill(0)
            for group in _overlapping(groups, start, stop):
                read_group(group, here, cells)
            totals.append(reduce_cells(cells, here.population, spec.window))
            seen.update(cells.rows)
            by_day.update(cells.by_day)
        return merge(totals), seen, by_day

    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(blocks, [bounds[i::threads] for i in range(threads)]))
    for _, seen, _ in found:
        rows.update(seen)
    return merge(totals for totals, _, _ in found), rows, sum((by_day for _, _, by_day in found), Counter[int]())


def _between(whole: Population, start: int, stop: int) -> Population:
    at = slice(start - whole.offset, stop - whole.offset)
    return replace(whole, group=whole.group[at], exposed=whole.exposed[at], offset=start)


def _overlapping(groups: Sequence[Group], start: int, stop: int) -> list[Group]:
    return [g for g in groups if g.low < stop and g.high >= start]
