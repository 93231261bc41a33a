"""Column generation against the full linear program, and whole rows against every choice there is."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel_tasks.curation.apportion import Cells, Goal, distance, plan, whole

EPSILON = 1e-3


def _instance(
    seed: int, variables: int, most_rows: int, widths: tuple[int, ...] = (3, 2), groups: int = 2
) -> tuple[Cells, Goal, np.ndarray, int]:
    """A random pool with at least one feasible subset: the bounds are read off a random sample of it."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(1, most_rows + 1, variables)
    sample = rng.integers(0, rows + 1)
    sample[0] = max(1, sample[0])
    group = rng.integers(0, groups + 1, variables)
    first = rng.random(variables) < 0.3
    values = np.stack([rng.integers(0, width, variables) for width in widths], axis=1)
    size = int(sample.sum())
    cap_rows = max((int(sample[group == g].sum()) for g in range(groups)), default=0)
    floor_rows = int(sample[first].sum())
    targets = tuple(rng.dirichlet(np.ones(width)) for width in widths)
    goal = Goal(cap_rows / size, floor_rows / size, size, size, targets, tuple(rng.uniform(0.5, 2, len(widths))))
    base = rng.integers(0, rows + 1)
    return Cells(rows, first, group, values, groups), goal, base, cap_rows


def _full_program(cells: Cells, goal: Goal, base: np.ndarray) -> float:
    """The same program written out whole, for scipy."""
    from scipy.optimize import linprog

    n, size = len(cells.rows), goal.most
    indicator = np.vstack([cells.values[:, d] == v for d, t in enumerate(goal.targets) for v in range(len(t))]).astype(
        float
    )
    k = len(indicator)
    weight = np.concatenate([np.full(len(t), w) for t, w in zip(goal.targets, goal.weights, strict=True)])
    eye, none = np.eye(k), np.zeros
    equal = np.block([[np.ones((1, n)), none((1, 2 * k + 2 * n))], [indicator, -eye, eye, none((k, 2 * n))],
                      [np.eye(n), none((n, 2 * k)), -np.eye(n), np.eye(n)]])  # fmt: skip
    most = np.vstack([-cells.first.astype(float), *[(cells.group == g).astype(float) for g in range(cells.groups)]])
    answer = linprog(
        np.concatenate([none(n), weight, weight, np.full(2 * n, EPSILON)]),
        A_eq=equal, b_eq=np.concatenate([[size], np.concatenate(goal.targets) * size, base]),
        A_ub=np.hstack([most, none((len(most), 2 * k + 2 * n))]),
        b_ub=np.concatenate([[-goal.floor * size], np.full(cells.groups, goal.cap * size)]),
        bounds=[(0, r) for r in cells.rows] + [(0, None)] * (2 * k + 2 * n), method="highs",
    )  # fmt: skip
    assert answer.success
    return float(answer.fun)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 100_000), variables=st.integers(2, 120), most_rows=st.integers(1, 500))
def test_column_generation_reaches_the_optimum_of_the_whole_program(seed, variables, most_rows):
    cells, goal, base, _ = _instance(seed, variables, most_rows)
    found = plan(cells, goal, base)
    assert found.unmet == pytest.approx(0, abs=1e-6)
    assert found.gap < 1e-3
    assert found.objective == pytest.approx(_full_program(cells, goal, base), rel=1e-6, abs=1e-5)
    assert found.take.sum() == pytest.approx(goal.most)
    assert found.take.min() > -1e-6
    assert (found.take <= cells.rows + 1e-6).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 100_000), variables=st.integers(2, 900))
def test_whole_rows_keep_every_hard_bound_exactly(seed, variables):
    cells, goal, base, cap_rows = _instance(seed, variables, 40, widths=(5, 4, 3), groups=4)
    floor_rows = round(goal.floor * goal.most)
    planned = plan(cells, goal, base)
    take = whole(cells, goal, planned.take, cap_rows, floor_rows)
    assert take.sum() == goal.most
    assert ((take >= 0) & (take <= cells.rows)).all()
    assert take[cells.first].sum() >= floor_rows
    assert all(take[cells.group == g].sum() <= cap_rows for g in range(cells.groups))
    constraints = 2 + cells.groups + sum(map(len, goal.targets))
    moved_at_most = 2 * max(goal.weights) * len(goal.targets) * constraints
    assert distance(cells, goal, take) <= distance(cells, goal, planned.take) + moved_at_most


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 100_000), variables=st.integers(2, 6))
def test_small_pools_get_the_nearest_subset_of_all(seed, variables):
    cells, goal, base, cap_rows = _instance(seed, variables, 3)
    floor_rows = round(goal.floor * goal.most)
    take = whole(cells, goal, plan(cells, goal, base).take, cap_rows, floor_rows)
    best = min(
        distance(cells, goal, x)
        for choice in itertools.product(*(range(r + 1) for r in cells.rows))
        if (x := np.array(choice)).sum() == goal.most
        and x[cells.first].sum() >= floor_rows
        and all(x[cells.group == g].sum() <= cap_rows for g in range(cells.groups))
    )
    assert distance(cells, goal, take) == pytest.approx(best, abs=1e-6)


def test_among_equally_near_subsets_the_joint_distribution_is_left_alone():
    """Four cells, two dimensions, margins met by any diagonal: only the proportional one keeps the dimensions
    independent."""
    cells = Cells(
        np.full(4, 100),
        np.zeros(4, dtype=bool),
        np.zeros(4, dtype=np.int64),
        np.array([[0, 0], [0, 1], [1, 0], [1, 1]]),
        0,
    )
    goal = Goal(1, 0, 200, 200, (np.array([0.5, 0.5]), np.array([0.5, 0.5])), (1.0, 1.0))
    assert plan(cells, goal, np.full(4, 50)).take.tolist() == [50, 50, 50, 50]


def test_a_tolerance_finds_the_largest_size_in_closed_form():
    """90 of a, 10 of b, wanted half and half: within 0.1 means b >= 0.4, so 25 rows."""
    cells = Cells(np.array([90, 10]), np.zeros(2, dtype=bool), np.zeros(2, dtype=np.int64), np.array([[0], [1]]), 0)
    goal = Goal(1, 0, 1, 100, (np.array([0.5, 0.5]),), (1.0,), (0.1,))
    assert plan(cells, goal, np.array([90, 10])).size == pytest.approx(25)
    nowhere = replace(goal, targets=(np.array([0.0, 0.0, 1.0]),), least=1, most=1)
    assert plan(cells, nowhere, np.array([1, 0])).excess[0] / 2 == pytest.approx(0.9)


def test_the_same_problem_has_the_same_answer_every_time():
    cells, goal, base, _ = _instance(5, 800, 50, widths=(5, 4), groups=3)
    once, twice = plan(cells, goal, base), plan(cells, goal, base)
    assert np.array_equal(once.take, twice.take)
