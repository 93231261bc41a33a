"""From the matrix of sends to exact moments per group (eq. 9-13): additive over any split of the units.

Per group (arm and segment values) the moments of
    breadth    sum of active days, times scale / |D_i|         over units             eq. 9, 11
    depth      S_i                                              over active units      eq. 12, 13
    sends      S_i                                              over exposed units
    active     A_i                                              over exposed units
    *@d        the same up to and including day d, over the units exposed by then (looks)
    day_*@d    the same on day d alone (novelty)
    x_*        the pre-period covariate and its products with the outcome (CUPED)
    pre_*@p    the same on day p of the pre-period alone
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flywheel_tasks.release.population import Population
from flywheel_tasks.release.scan import Cells
from flywheel_tasks.release.window import Window
from flywheel_tasks.stats.moments import BLOCK, Moments, dot, moments

Group = tuple[str, ...]
Totals = dict[Group, dict[str, Moments]]


def reduce_cells(cells: Cells, population: Population, window: Window, threads: int = 1) -> Totals:
    """The moments of every group."""
    starts = range(0, population.slots, BLOCK)

    def block(at: int) -> Totals:
        return _block(cells, population, window, at)

    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            return merge(pool.map(block, starts))
    return merge(map(block, starts))


def merge(parts: Iterable[Totals]) -> Totals:
    """Moments of disjoint units, added by name."""
    whole: Totals = {}
    for part in parts:
        for group, named in part.items():
            mine = whole.setdefault(group, {})
            for name, m in named.items():
                mine[name] = mine.get(name, Moments()).plus(m)
    return whole


def _block(cells: Cells, population: Population, window: Window, at: int) -> Totals:
    group = population.group[at : at + BLOCK]
    matrix = cells.matrix[:, at : at + BLOCK]
    exposed = population.exposed[at : at + BLOCK]
    out: Totals = {}
    if group[0] >= 0 and bool((group == group[0]).all()):
        _add_group(out, population, int(group[0]), matrix, exposed, window)
        return out
    order = np.argsort(group, kind="stable")
    ranked = group[order]
    first = int(np.searchsorted(ranked, 0))
    codes, starts = np.unique(ranked[first:], return_index=True)
    ends = [*starts[1:], len(ranked) - first]
    for code, start, end in zip(codes, starts, ends, strict=True):
        units = order[first + start : first + end]
        _add_group(out, population, int(code), np.take(matrix, units, axis=1), exposed[units], window)
    return out


def _add_group(
    out: Totals, population: Population, code: int, matrix: NDArray[Any], exposed: NDArray[np.int32], window: Window
) -> None:
    name = population.groups[code]
    if not population.split_returning:
        out[name] = _group(matrix, exposed, window)
        return
    seen = matrix[: window.pre_days].any(axis=0)
    for returning, chosen in (("returning", seen), ("new", ~seen)):
        if chosen.any():
            out[(*name, returning)] = _group(matrix[:, chosen], exposed[chosen], window)


def _group(matrix: NDArray[Any], exposed: NDArray[np.int32], window: Window) -> dict[str, Moments]:
    n = matrix.shape[1]
    sends = np.zeros(n, np.int64)
    days = np.zeros(n, np.uint8)
    ever = np.zeros(n, bool)
    weight = None
    latest = int(exposed.max(initial=0))
    out: dict[str, Moments] = {}
    for d in window.kept:
        today = matrix[window.pre_days + d]
        active = today > 0
        count = int(np.count_nonzero(active))
        wide = today.astype(np.int64)
        sends += wide
        days += active.view(np.uint8)
        ever |= active
        here = None if window.relative or latest <= window.first + d else exposed <= window.first + d
        out[f"day_active@{d}"] = Moments(n if here is None else int(np.count_nonzero(here)), count, count)
        out[f"day_depth@{d}"] = moments(wide)._replace(n=count)
        if window.estimand == "days_since_exposure":  # a unit that comes later is left out of this look
            weight = window.scale // np.maximum(window.observable(exposed, d), 1)
        at = "" if d == window.kept[-1] else f"@{d}"
        out |= {name + at: m for name, m in _through(days, sends, ever, weight, here).items()}
    if window.pre_days:
        out |= _covariates(matrix[: window.pre_days], sends, _weighed(days, weight))
    return out


def _through(
    days: NDArray[np.uint8],
    sends: NDArray[np.int64],
    ever: NDArray[np.bool_],
    weight: NDArray[np.int64] | None,
    here: NDArray[np.bool_] | None,
) -> dict[str, Moments]:
    """Sends so far, over the units that were exposed so far."""
    if here is not None:
        days, sends, ever = days[here], sends[here], ever[here]
        weight = None if weight is None else weight[here]
    total = moments(sends)
    active = int(np.count_nonzero(ever))
    return {
        "breadth": moments(_weighed(days, weight)),
        "sends": total,
        "depth": total._replace(n=active),
        "active": Moments(len(days), active, active),
    }


def _weighed(days: NDArray[np.uint8], weight: NDArray[np.int64] | None) -> NDArray[np.int64]:
    return days.astype(np.int64) if weight is None else days * weight


def _covariates(before: NDArray[Any], sends: NDArray[np.int64], breadth: NDArray[np.int64]) -> dict[str, Moments]:
    """Pre-period sends for the sends of the window, pre-period active days for its breadth. A product's sum is in
    `total`."""
    x_sends = before.sum(axis=0, dtype=np.int64)
    x_days = np.count_nonzero(before > 0, axis=0).astype(np.int64)
    counts = [int(np.count_nonzero(day)) for day in before]
    return {f"pre_active@{p}": Moments(len(sends), count, count) for p, count in enumerate(counts)} | {
        "x_sends": moments(x_sends),
        "x_breadth": moments(x_days),
        "xy_sends": Moments(len(sends), dot(x_sends, sends), 0),
        "xy_breadth": Moments(len(sends), dot(x_days, breadth), 0),
    }
