"""The largest feasible size against every subset there is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel_tasks.curation.sizing import cap_rows, conflicts, feasible, floor_rows, largest, relaxations, smallest

pools = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=7).map(
    lambda pairs: (np.array([max(p) for p in pairs], dtype=np.int64), np.array([min(p) for p in pairs], dtype=np.int64))
)
caps = st.sampled_from([0.1, 0.2, 0.25, 0.3, 0.5, 1.0])
floors = st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0])


def _most_first_turns(rows, first_turns, cap):
    """For each size that the cap allows, the most first turns a subset can hold: every split over characters is
    tried."""
    best = {0: 0}
    for n, f in zip(rows.tolist(), first_turns.tolist(), strict=True):
        best = {
            size: max(
                held + min(taken, f) for taken in range(min(n, cap) + 1) if (held := best.get(size - taken)) is not None
            )
            for size in range(max(best) + min(n, cap) + 1)
        }
    return best


@settings(max_examples=200, deadline=None)
@given(pool=pools, cap=caps, floor=floors)
def test_feasibility_agrees_with_every_possible_subset(pool, cap, floor):
    rows, first_turns = pool
    answer = feasible(rows, first_turns, cap, floor)
    for size in range(int(rows.sum()) + 1):
        best = _most_first_turns(rows, first_turns, cap_rows(cap, size))
        assert answer[size] == (best.get(size, -1) >= floor_rows(floor, size))


@settings(max_examples=60, deadline=None)
@given(pool=pools, cap=caps, floor=floors, least=st.integers(1, 6))
def test_a_relaxation_works_and_a_smaller_one_does_not(pool, cap, floor, least):
    rows, first_turns = pool
    if largest(rows, first_turns, cap, floor) >= least or rows.sum() < least:
        return
    assert conflicts(rows, first_turns, cap, floor, least)
    options = relaxations(rows, first_turns, cap, floor, least)
    assert options
    for found in options:
        assert largest(rows, first_turns, found.cap, found.floor) == found.size >= least
        if found.cap > cap:
            assert largest(rows, first_turns, found.cap - 1e-4, floor) < least
        if found.floor < floor and found.cap == cap:
            assert largest(rows, first_turns, cap, found.floor + 1e-4) < least


@settings(max_examples=60, deadline=None)
@given(pool=pools, cap=caps, floor=floors, least=st.integers(1, 6), room=st.integers(0, 12))
def test_with_a_largest_size_the_relaxations_agree_with_every_possible_subset(pool, cap, floor, least, room):
    rows, first_turns = pool
    limit = least + room

    def possible(cap, floor):
        sizes = range(least, min(limit, int(rows.sum())) + 1)
        best = {size: _most_first_turns(rows, first_turns, cap_rows(cap, size)).get(size, -1) for size in sizes}
        return [size for size in sizes if best[size] >= floor_rows(floor, size)]

    if possible(cap, floor) or rows.sum() < least:
        return
    clash = conflicts(rows, first_turns, cap, floor, least, limit)
    assert not possible(cap if "character_cap" in clash else 1.0, floor if "first_turn_floor" in clash else 0.0)
    if len(clash) == 2:
        assert possible(1.0, floor)
        assert possible(cap, 0.0)
    options = relaxations(rows, first_turns, cap, floor, least, limit)
    assert options
    for found in options:
        assert found.cap >= cap
        assert found.floor <= floor
        assert max(possible(found.cap, found.floor)) == found.size
        if found.cap > cap:
            assert not possible(found.cap - 1e-4, floor)
        if found.floor < floor and found.cap == cap:
            assert not possible(cap, found.floor + 1e-4)


def test_three_per_cent_needs_thirty_four_characters():
    assert largest(np.full(33, 1000), np.full(33, 1000), 0.03, 0.1) == 0
    assert largest(np.full(34, 1000), np.full(34, 1000), 0.03, 0.1) == 34_000
    assert smallest(np.full(34, 1000), np.full(34, 1000), 0.03, 0.1, 1) == 34


@pytest.mark.parametrize(("size", "rows"), [(100, 3), (99, 2), (1_000_000, 30_000), (33, 0)])
def test_a_share_is_the_decimal_that_was_written(size, rows):
    assert cap_rows(0.03, size) == rows


def test_ten_per_cent_of_first_turns_rounds_up():
    assert [floor_rows(0.1, size) for size in (0, 1, 10, 11, 70)] == [0, 1, 1, 2, 7]
