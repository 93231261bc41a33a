"""Which rows to take from which cell: the linear program behind Phase III (Sec. 2.2.1, Table 1).

Prompts with the same values in every dimension form a *cell*; one variable stands for the prompts of a cell that
belong to one character at its cap, or to all the other characters together (whose cap cannot bind: they have no more
rows than it allows). For a subset of N prompts

    minimise   sum_d w_d |marginal_d - N target_d|_1  +  epsilon sum |x - b|
    subject to sum x = N,  first turns >= floor N,  each character <= cap N,  0 <= x <= available,

where b is the proportional sample under the caps: among subsets that match the targets equally well, the one that
distorts the joint distribution least. With `tolerance`, N is a variable too and is maximised while every dimension
stays within that total-variation distance of its target.

There are few rows (one per character at its cap, one per value of a dimension) and many columns, so the program is
solved by column generation: HiGHS optimises over the moves away from b that are known, the duals price all others,
and the end is reached when no move pays. The last duals give a lower bound by weak duality; the gap to it is
reported, not assumed.

A basic solution has at most as many fractional variables as rows. They are rounded by a small integer program. It
always has a solution: each variable belongs to one character and to one of {first turn, other}, so the hard bounds
are a network flow with whole-number bounds, whose rounding exists. Hard bounds hold exactly; the soft distances move
by less than one row per row of the program."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flywheel_tasks.core.errors import FlywheelError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_EPSILON = 1e-3
_UNMET = 1e5
_PAYS = 1e-7
_BATCH = 4000
_ROUNDS = 1000
_SMALL = 400
_NODES = 2000


@dataclass(frozen=True)
class Cells:
    """The variables: rows available, whether they are first turns, the group, and the value in each dimension.

    Group g < groups is one character that the cap may bind; group `groups` is everybody else.
    """

    rows: Ints
    first: NDArray[np.bool_]
    group: Ints
    values: Ints
    groups: int


@dataclass(frozen=True)
class Goal:
    """Hard bounds as shares of N, the range of N, and per dimension a target (shares) and a weight.

    With a tolerance and `least` < `most` the goal is the largest N; with `least` == `most` it is the smallest
    distance, or, given a tolerance too, the smallest excess over it."""

    cap: float
    floor: float
    least: int
    most: int
    targets: tuple[Floats, ...]
    weights: tuple[float, ...]
    tolerance: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Plan:
    """A vertex of the linear program: rows to take per variable, N, the excess over the tolerance per dimension (rows),
    hard rows unmet, the objective, and how far below it the optimum can be at most."""

    take: Floats
    size: float
    excess: Floats
    unmet: float
    objective: float
    gap: float


@dataclass(frozen=True)
class _Layout:
    """Row numbers of the program: total, first turns, caps, values of the dimensions, tolerances."""

    values: int
    tolerances: int
    count: int
    dimension: Ints
    entries: Ints


def _layout(cells: Cells, goal: Goal) -> _Layout:
    widths = [len(target) for target in goal.targets]
    starts = 2 + cells.groups + np.cumsum([0, *widths])
    end = int(starts[-1])
    entries = [
        np.zeros(len(cells.rows), np.int64),
        np.where(cells.first, 1, -1),
        np.where(cells.group < cells.groups, 2 + cells.group, -1),
    ]
    entries += [starts[d] + cells.values[:, d] for d in range(len(widths))]
    tolerances = len(widths) if goal.tolerance is not None else 0
    return _Layout(
        2 + cells.groups, end, end + tolerances, np.repeat(np.arange(len(widths)), widths), np.stack(entries, axis=1)
    )


def _matrix(entries: Ints, sign: Floats, count: int) -> Any:
    """Columns of the program for moves of the given variables, up (+1) or down (-1)."""
    from scipy import sparse

    column, place = np.nonzero(entries >= 0)
    return sparse.csc_array((sign[column], (entries[column, place], column)), shape=(count, len(entries)))


def _core(layout: _Layout, cells: Cells, goal: Goal) -> tuple[Any, Floats, Floats, Floats]:
    """N, the distances above and below each target, the excess over each tolerance, and unmet hard rows: (A, cost,
    low, high)."""
    from scipy import sparse

    values = len(layout.dimension)
    grows = goal.least < goal.most
    size = np.zeros((layout.count, 1))
    size[0], size[1], size[2 : layout.values] = -1, -goal.floor, -goal.cap
    size[layout.values : layout.tolerances, 0] = -np.concatenate([np.zeros(0), *goal.targets])
    size[layout.tolerances :, 0] = -2 * np.array(goal.tolerance or ())
    above = np.zeros((layout.count, values))
    above[layout.values + np.arange(values), np.arange(values)] = -1
    below = -above
    if goal.tolerance is not None:
        for side in (above, below):
            side[layout.tolerances + layout.dimension, np.arange(values)] = 1
    excess = -np.eye(layout.count)[:, layout.tolerances :]
    unmet = np.eye(layout.count)[:, : layout.values] * np.where(np.arange(layout.values) < 2, 1.0, -1.0)
    over = -np.eye(layout.count)[:, :1]
    weight = np.zeros(values) if goal.tolerance is not None else np.asarray(goal.weights, dtype=float)[layout.dimension]
    blocks = [size, above, below, excess, unmet, over]
    cost = np.concatenate([
        [-1.0 if grows else 0.0], weight, weight,
        np.full(excess.shape[1], _UNMET if grows else 1.0), np.full(layout.values + 1, _UNMET),
    ])  # fmt: skip
    low, high = np.zeros(len(cost)), np.full(len(cost), np.inf)
    low[0], high[0] = goal.least, goal.most
    return sparse.csc_array(np.hstack(blocks)), cost, low, high


def plan(cells: Cells, goal: Goal, base: Ints) -> Plan:
    """Optimise by column generation around the sample `base`."""
    import highspy

    layout = _layout(cells, goal)
    at_base = _matrix(layout.entries, np.ones(len(base)), layout.count) @ base.astype(np.float64)
    low, high = np.zeros(layout.count), np.zeros(layout.count)
    high[1] = np.inf
    low[2 : layout.values] = low[layout.tolerances :] = -np.inf
    solver = highspy.Highs()
    for option, value in (("output_flag", False), ("threads", 1), ("solver", "simplex"), ("presolve", "off")):
        solver.setOptionValue(option, value)
    none = np.zeros(0, dtype=np.int32)
    solver.addRows(layout.count, low - at_base, high - at_base, 0, none, none, np.zeros(0))
    matrix, cost, lower, upper = _core(layout, cells, goal)
    _add(solver, matrix, cost, lower, upper)

    room = np.stack([cells.rows - base, base]).astype(np.float64)
    waiting = room > 0
    moves: list[Ints] = []
    for _ in range(_ROUNDS):
        solver.run()
        if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            raise FlywheelError(
                f"constrain: the solver stopped with '{solver.modelStatusToString(solver.getModelStatus())}'"
            )
        duals = np.append(np.asarray(solver.getSolution().row_dual), 0.0)
        worth = sum(duals[column] for column in layout.entries.T)
        reduced = np.where(waiting, np.stack([_EPSILON - worth, _EPSILON + worth]), 0.0)
        gain = (reduced * room).ravel()
        paying = np.flatnonzero(reduced.ravel() < -_PAYS)
        if not len(paying):
            break
        if len(paying) > _BATCH:
            paying = np.sort(paying[np.argpartition(gain[paying], _BATCH)[:_BATCH]])
        waiting.ravel()[paying] = False
        moves.append(paying)
        variable, sign = paying % len(base), np.where(paying < len(base), 1.0, -1.0)
        columns = _matrix(layout.entries[variable], sign, layout.count)
        _add(solver, columns, np.full(len(paying), _EPSILON), np.zeros(len(paying)), room.ravel()[paying])
    found = np.asarray(solver.getSolution().col_value)
    moved = np.concatenate([np.zeros(0, dtype=np.int64), *moves])
    change = np.zeros(2 * len(base))
    change[moved] = found[len(cost) :]
    values, tolerances = len(layout.dimension), layout.count - layout.tolerances
    return Plan(
        take=base + change[: len(base)] - change[len(base) :],
        size=float(found[0]),
        excess=found[1 + 2 * values : 1 + 2 * values + tolerances],
        unmet=float(found[1 + 2 * values + tolerances : len(cost)].sum()),
        objective=float(solver.getInfo().objective_function_value),
        gap=float(-np.minimum(gain, 0).sum()),
    )


def _add(solver: Any, matrix: Any, cost: Floats, low: Floats, high: Floats) -> None:
    solver.addCols(
        len(cost),
        cost,
        low,
        high,
        matrix.nnz,
        matrix.indptr[:-1].astype(np.int32),
        matrix.indices.astype(np.int32),
        matrix.data,
    )


def whole(cells: Cells, goal: Goal, take: Floats, cap_rows: int, floor_rows: int) -> Ints:
    """Round a plan to whole rows: hard bounds exactly, distance to the targets as small as rounding allows."""
    from scipy import optimize, sparse

    near = np.rint(take)
    settled = np.abs(take - near) < 1e-6
    free = np.flatnonzero(~settled) if len(take) > _SMALL else np.arange(len(take))
    fixed = near.astype(np.int64)
    if len(take) > _SMALL:
        low, high = np.floor(take[free]), np.ceil(take[free])
    else:
        low, high = np.zeros(len(free)), cells.rows[free].astype(np.float64)
    fixed[free] = 0
    if not len(free):
        return fixed
    layout = _layout(cells, Goal(0, 0, 0, 0, goal.targets, goal.weights))
    held = _matrix(layout.entries, np.ones(len(take)), layout.count) @ fixed.astype(np.float64)
    values = len(layout.dimension)
    aims = np.concatenate([np.zeros(0), *goal.targets]) * goal.most
    row_low = np.concatenate([[goal.most, floor_rows], np.full(cells.groups, -np.inf), aims]) - held
    row_high = np.concatenate([[goal.most, np.inf], np.full(cells.groups, cap_rows), aims]) - held
    distance = sparse.vstack([sparse.csc_array((layout.values, values)), sparse.eye_array(values)])
    weight = np.asarray(goal.weights, dtype=float)[layout.dimension] if values else np.zeros(0)
    result = optimize.milp(
        np.concatenate([np.zeros(len(free)), weight, weight]),
        integrality=np.concatenate([np.ones(len(free)), np.zeros(2 * values)]),
        bounds=optimize.Bounds(
            np.concatenate([low, np.zeros(2 * values)]), np.concatenate([high, np.full(2 * values, np.inf)])
        ),
        constraints=optimize.LinearConstraint(
            sparse.hstack([_matrix(layout.entries[free], np.ones(len(free)), layout.count), -distance, distance]),
            row_low,
            row_high,
        ),
        options={"node_limit": _NODES, "presolve": True},
    )
    if result.x is None:
        raise FlywheelError(f"constrain: rounding to whole rows failed: {result.message}")
    fixed[free] = np.rint(result.x[: len(free)]).astype(np.int64)
    return fixed


def distance(cells: Cells, goal: Goal, take: NDArray[Any]) -> float:
    """Weighted distance of the marginals to their targets, in rows."""
    return sum(
        weight
        * float(np.abs(np.bincount(cells.values[:, d], weights=take, minlength=len(target)) - goal.most * target).sum())
        for d, (target, weight) in enumerate(zip(goal.targets, goal.weights, strict=True))
    )
