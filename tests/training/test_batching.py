"""A step is its global batch: cutting it for memory or for workers loses nothing and repeats nothing."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel_tasks.training import batching

lengths_of = st.lists(st.integers(1, 500), min_size=1, max_size=60)


@given(lengths_of, st.integers(1, 2000), st.integers(1, 4))
def test_every_row_is_in_exactly_one_micro_batch(lengths: list[int], budget: int, workers: int) -> None:
    parts = batching.cut(lengths, budget, workers)
    seen = np.concatenate([micro for part in parts for micro in part])
    assert sorted(seen.tolist()) == list(range(len(lengths)))


@given(lengths_of, st.integers(1, 2000), st.integers(1, 4))
def test_no_micro_batch_exceeds_the_budget_unless_one_row_does(lengths: list[int], budget: int, workers: int) -> None:
    for part in batching.cut(lengths, budget, workers):
        for micro in part:
            assert len(micro) <= 1 or sum(lengths[i] for i in micro) <= budget


@given(lengths_of, st.integers(1, 2000), st.integers(1, 4))
def test_every_worker_has_as_many_micro_batches(lengths: list[int], budget: int, workers: int) -> None:
    """Collectives meet at every micro-batch; a worker may only lack rows when there are fewer rows than workers."""
    parts = batching.cut(lengths, budget, workers)
    assert len({len(part) for part in parts}) == 1
    assert len(lengths) < workers * len(parts[0]) or all(len(micro) for part in parts for micro in part)


@given(st.integers(1, 200), st.integers(1, 64), st.integers(0, 5), st.integers(0, 2**31))
def test_an_epoch_sees_every_row_once(rows: int, batch: int, epoch: int, seed: int) -> None:
    per = batching.steps_per_epoch(rows, batch)
    seen = np.concatenate([batching.step_rows(rows, batch, epoch * per + i, seed) for i in range(per)])
    assert sorted(seen.tolist()) == list(range(rows))


def test_epochs_and_seeds_shuffle_differently_but_repeatably() -> None:
    first = batching.step_rows(1000, 1000, 0, 7)
    assert (first == batching.step_rows(1000, 1000, 0, 7)).all()
    assert (first != batching.step_rows(1000, 1000, 1, 7)).any()
    assert (first != batching.step_rows(1000, 1000, 0, 8)).any()


@given(lengths_of, st.integers(1, 2000))
def test_rows_of_like_length_meet(lengths: list[int], budget: int) -> None:
    micro = [[lengths[i] for i in rows] for rows in batching.cut(lengths, budget)[0]]
    assert all(min(longer) >= max(shorter) for longer, shorter in pairwise(micro))


def test_two_workers_get_like_loads() -> None:
    lengths = np.random.default_rng(1).integers(20, 400, 128)
    loads = [sum(lengths[m].sum() for m in part) for part in batching.cut(lengths, 4096, 2)]
    assert max(loads) / min(loads) < 1.1


@pytest.mark.parametrize("workers", [1, 3])
def test_fewer_rows_than_workers_leaves_empty_parts(workers: int) -> None:
    parts = batching.cut([10], 100, workers)
    assert [len(part[0]) for part in parts] == [1] + [0] * (workers - 1)
