"""From bounds and targets to the rows that stay (Sec. 2.2.1 Phase III): size, plan, whole rows, and which ones."""

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.curation import apportion, sizing
from flywheel_tasks.curation.apportion import Cells, Goal, Ints, Plan
from flywheel_tasks.curation.cells import Dimension, group, proportional

if TYPE_CHECKING:
    from flywheel_tasks.curation.constrain import ConstrainConfig

_SMALLEST_SHARE = 100
"""A tolerance may cost rows, but not more than all but one in this many of the largest feasible subset."""


@dataclass(frozen=True)
class Selection:
    """Which rows stay, the bounds they were chosen under, and what is proved about the choice."""

    rows: NDArray[np.bool_]
    at_cap: NDArray[np.bool_]
    cap: float
    floor: float
    largest: int
    capped: int
    first_turn_share: float
    largest_character_share: float
    gap_rows: float
    relaxed: list[str]


@dataclass(frozen=True)
class Pool:
    """The candidates: character and first-turn flag per row, prompts and first turns per character."""

    character: Ints
    first: NDArray[np.bool_]
    rows: Ints
    first_turns: Ints
    dimensions: list[Dimension]


def select(table: pa.Table, dimensions: list[Dimension], config: "ConstrainConfig", seed: int) -> Selection:
    """The largest subset within the bounds, nearest to the targets; rows within a cell by a seeded hash of their id."""
    character = _numbered(table["character_id"])
    first = table["first_turn"].to_numpy()
    pool = Pool(
        character,
        first,
        np.bincount(character),
        np.bincount(character[first], minlength=int(character.max()) + 1),
        dimensions,
    )
    cap, floor, relaxed = _hard_bounds(pool, config)
    most = sizing.largest(pool.rows, pool.first_turns, cap, floor)
    size = sizing.largest(pool.rows, pool.first_turns, cap, floor, config.size)
    weights = tuple(config.weight(d.name) for d in dimensions)
    goal = Goal(cap, floor, size, size, tuple(d.target for d in dimensions), weights)
    limits: tuple[float, ...] = ()
    if config.tolerance is not None and dimensions:
        size, limits, eased = _within_tolerance(pool, goal, config)
        relaxed = [*relaxed, *eased]
    take, cell, gap = _apportion(pool, replace(goal, least=size, most=size))
    while over := _over(pool, cell, take, limits):
        # Whole rows may land just outside a tolerance that fractions meet: a little smaller, where there is more room.
        smaller = sizing.largest(pool.rows, pool.first_turns, cap, floor, size - 1 - size // 1000)
        if smaller < _enough(goal, config):
            why = f"the nearest whole rows miss the tolerance at every size tried, down to {size}: {over}"
            if config.on_infeasible == "stop":
                raise InputError(f"constrain: {why}. Raise constrain.tolerance, or constrain.on_infeasible=relax")
            relaxed = [*relaxed, f"{why}; kept"]
            break
        size = smaller
        take, cell, gap = _apportion(pool, replace(goal, least=size, most=size))
    rows = _first_by_hash(table["prompt_id"], cell, take, seed)
    kept = np.bincount(character[rows], minlength=len(pool.rows))
    capped = pool.rows > sizing.cap_rows(cap, size)
    return Selection(
        rows=rows,
        at_cap=capped[character],
        cap=cap,
        floor=floor,
        largest=most,
        capped=int(capped.sum()),
        first_turn_share=float(first[rows].mean()),
        largest_character_share=float(kept.max() / size),
        gap_rows=gap,
        relaxed=relaxed,
    )


def _numbered(names: pa.ChunkedArray) -> Ints:
    """Numbers in the order of the names, so that the program does not depend on how rows are filed."""
    encoded = names.combine_chunks().dictionary_encode()
    order = np.argsort(np.array(encoded.dictionary.to_pylist(), dtype=object), kind="stable")
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.arange(len(order))
    return number[encoded.indices.to_numpy()]


def _hard_bounds(pool: Pool, config: "ConstrainConfig") -> tuple[float, float, list[str]]:
    """The bounds to apply: those asked for, or where nothing meets them the smallest relaxation, if that is allowed."""
    cap, floor, least = config.character_cap, config.first_turn_floor, config.least_rows
    total = int(pool.rows.sum())
    if sizing.largest(pool.rows, pool.first_turns, cap, floor, config.size) >= least:
        return cap, floor, []
    if min(total, config.size or total) < least:
        raise InputError(
            f"constrain: there are {total} candidates and constrain.size is {config.size}, "
            f"but constrain.least_rows asks for {least}; lower it"
        )
    clash = sizing.conflicts(pool.rows, pool.first_turns, cap, floor, least, config.size)
    options = sizing.relaxations(pool.rows, pool.first_turns, cap, floor, least, config.size)
    bounds = " with ".join(_named(clash, pool, cap, floor, config.size))
    span = f"at least {least}" if config.size is None else f"{least} to constrain.size={config.size}"
    why = f"no subset of {span} of the {total} candidates meets {bounds}"
    if not options:
        raise InputError(
            f"constrain: {why}, and no relaxation of them would do; lower constrain.least_rows or bring more traffic"
        )
    best = options[0]
    if config.on_infeasible == "relax":
        return best.cap, best.floor, [f"{why}; applied {_bounds(best)}"]
    many = max(least, min(total, config.size or total) // 2)
    roomy = sizing.relaxations(pool.rows, pool.first_turns, cap, floor, many, config.size)
    half_of = "the candidates" if config.size is None else "constrain.size"
    half = f", or {_bounds(roomy[0])} for half of {half_of} or more" if roomy and roomy[0].size > best.size else ""
    raise InputError(
        f"constrain: {why}. Smallest relaxation: {' or '.join(map(_bounds, options))}{half}. "
        "Set these, or constrain.on_infeasible=relax to apply the smallest"
    )


def _bounds(relaxed: sizing.Relaxation) -> str:
    return f"constrain.character_cap={relaxed.cap:g} constrain.first_turn_floor={relaxed.floor:g} ({relaxed.size} rows)"


def _named(clash: tuple[str, ...], pool: Pool, cap: float, floor: float, size: int | None) -> list[str]:
    characters, first_turns = len(pool.rows), int(pool.first_turns.sum())
    needed = -int(-1 // sizing.exact(cap))
    if characters < needed:
        total = f"{characters} x {cap:.4g} = {characters * cap:.4g} < 1"
        arithmetic = f"it needs at least {needed} characters and there are {characters}: {total}"
    elif size is not None and size < needed:
        arithmetic = f"not one row of a character: {size} x {cap:.4g} = {size * cap:.4g} < 1"
    else:
        arithmetic = f"{characters} characters, the largest with {int(pool.rows.max())} rows"
    holders = int((pool.first_turns > 0).sum())
    words = {
        "character_cap": f"character_cap={cap:g} ({arithmetic})",
        "first_turn_floor": f"first_turn_floor={floor:g} ({first_turns} first turns, from {holders} characters)",
    }
    return [words[name] for name in clash]


def _grouped(pool: Pool, cap_rows: int, size: int) -> tuple[Cells, Ints, Ints]:
    capped = np.flatnonzero(pool.rows > cap_rows)
    cells, cell = group(pool.dimensions, pool.first, pool.character, capped)
    return cells, cell, proportional(cells, pool.rows, capped, cap_rows, size)


def _within_tolerance(pool: Pool, goal: Goal, config: "ConstrainConfig") -> tuple[int, tuple[float, ...], list[str]]:
    """The largest size at which every dimension is within the tolerance, and what had to be eased for there to be
    one."""
    tolerance = config.tolerance or 0.0
    smallest = sizing.smallest(pool.rows, pool.first_turns, goal.cap, goal.floor, _enough(goal, config))
    limits = (tolerance,) * len(goal.targets)
    least = _planned(pool, replace(goal, least=smallest, most=smallest, tolerance=limits))
    excess = least.excess / (2 * smallest)
    if not (excess > 1e-6).any():
        return _largest_planned(pool, replace(goal, least=smallest, tolerance=limits)), limits, []
    limits = tuple(
        float(np.ceil((tolerance + over) * 1e4 + 1e-6) / 1e4) if over > 1e-6 else tolerance for over in excess
    )
    needs = ", ".join(
        f"{d.name} {limit:.4f}" for d, limit, over in zip(pool.dimensions, limits, excess, strict=True) if over > 1e-6
    )
    why = (
        f"no subset of {smallest} rows or more is within tolerance {tolerance:g} of its targets; it would take {needs}"
    )
    if config.on_infeasible == "stop":
        raise InputError(
            f"constrain: {why}. Raise constrain.tolerance, change constrain.targets, or constrain.on_infeasible=relax"
        )
    return _largest_planned(pool, replace(goal, least=smallest, tolerance=limits)), limits, [f"{why}; applied"]


def _enough(goal: Goal, config: "ConstrainConfig") -> int:
    return max(config.least_rows, -(-goal.most // _SMALLEST_SHARE))


def _over(pool: Pool, cell: Ints, take: Ints, limits: tuple[float, ...]) -> str:
    """The dimensions outside their limits, if any. A limit below one row's worth can't be met by whole rows."""
    size, example = int(take.sum()), np.zeros(len(take), dtype=np.int64)
    example[cell] = np.arange(len(cell))
    reached = [
        (d, d.distance(np.bincount(d.codes[example], weights=take, minlength=len(d.values)) / size))
        for d in pool.dimensions
    ]
    return ", ".join(
        f"{d.name} {distance:.4f} of {limit:g}"
        for (d, distance), limit in zip(reached, limits, strict=False)
        if distance > limit + 1 / size
    )


def _planned(pool: Pool, goal: Goal) -> Plan:
    cells, _, base = _grouped(pool, int(goal.cap * goal.least), goal.most)
    return apportion.plan(cells, goal, base)


def _largest_planned(pool: Pool, goal: Goal) -> int:
    """Characters that the cap can't bind at the size found so far are pooled; a smaller size may bind more of them."""
    if goal.least == goal.most:
        return goal.most
    size = goal.most
    while True:
        cap_rows = sizing.cap_rows(goal.cap, size)
        cells, _, base = _grouped(pool, cap_rows, size)
        found = apportion.plan(cells, replace(goal, most=size), base) if size > goal.least else None
        smaller = int(found.size + 1e-6) if found else size
        if sizing.cap_rows(goal.cap, smaller) == cap_rows or not (
            (pool.rows <= cap_rows) & (pool.rows > sizing.cap_rows(goal.cap, smaller))
        ).any():  # fmt: skip
            return sizing.largest(pool.rows, pool.first_turns, goal.cap, goal.floor, smaller)
        size = smaller


def _apportion(pool: Pool, goal: Goal) -> tuple[Ints, Ints, float]:
    """Whole rows per cell, each row's cell, and by how many rows of distance at most they miss the optimum."""
    cap_rows, floor_rows = sizing.cap_rows(goal.cap, goal.most), sizing.floor_rows(goal.floor, goal.most)
    cells, cell, base = _grouped(pool, cap_rows, goal.most)
    exact = replace(goal, cap=cap_rows / goal.most, floor=floor_rows / goal.most)
    planned = apportion.plan(cells, exact, base)
    take = apportion.whole(cells, goal, planned.take, cap_rows, floor_rows)
    reached = apportion.distance(cells, goal, take)
    return take, cell, max(0.0, reached - apportion.distance(cells, goal, planned.take) + planned.gap)


def _first_by_hash(ids: pa.ChunkedArray, cell: Ints, take: Ints, seed: int) -> NDArray[np.bool_]:
    salt = seed.to_bytes(16, "little", signed=True)
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8, salt=salt).digest() for name in ids.to_pylist())
    order = np.lexsort((np.frombuffer(digests, dtype="<u8"), cell))
    starts = np.cumsum(np.bincount(cell, minlength=len(take))) - np.bincount(cell, minlength=len(take))
    place = np.arange(len(order)) - starts[cell[order]]
    rows = np.zeros(len(order), dtype=bool)
    rows[order] = place < take[cell[order]]
    return rows
