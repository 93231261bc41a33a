"""Farthest-first pruning: exact proportion, spread among kept rows, cover of removed ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel_tasks.curation.cluster import quantise, similarity
from flywheel_tasks.curation.prune import farthest_first, keep, redundancies
from tests.curation.curation_runs import blobs


def _reference(products: np.ndarray) -> tuple[list[float], list[int]]:
    """Farthest-first by the definition: at every step look at all pairs of taken and untaken rows."""
    taken, redundancy, nearest = [0], [-np.inf] * len(products), [0] * len(products)
    while len(taken) < len(products):
        rest = [row for row in range(len(products)) if row not in taken]
        row = min(rest, key=lambda r: (max(products[r, t] for t in taken), r))
        redundancy[row] = max(products[row, t] for t in taken)
        nearest[row] = max(taken, key=lambda t: products[row, t])
        taken.append(row)
    return redundancy, nearest


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), seed=st.integers(0, 10_000))
def test_redundancy_matches_the_definition(rows, seed):
    block = quantise(np.random.default_rng(seed).normal(size=(rows, 6)))[0].astype(np.float32)
    redundancy, nearest = farthest_first(block)
    expected, origin = _reference(block @ block.T)
    assert redundancy.tolist() == expected
    products = block @ block.T
    assert [products[i, j] for i, j in enumerate(nearest)][1:] == [products[i, j] for i, j in enumerate(origin)][1:]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(30, 600),
    seed=st.integers(0, 10_000),
    proportion=st.floats(0.2, 0.95),
    cap=st.sampled_from([16, 64, 1000]),
)
def test_kept_rows_are_spread_and_removed_rows_are_covered_by_one_radius(rows, seed, proportion, cap):
    vectors = quantise(blobs(rows, seed))[0]
    order = np.random.default_rng(seed).permutation(rows)
    found = redundancies(vectors, order, cap, seed)
    kept = keep(found.redundancy, order, np.ones(rows, dtype=np.int64), proportion) > 0
    assert kept.sum() == round(proportion * rows)
    finite = found.redundancy[kept & np.isfinite(found.redundancy)]
    cut = finite.max() if len(finite) else -np.inf
    for block in found.blocks:
        products = vectors[block].astype(np.float64) @ vectors[block].astype(np.float64).T
        inside = kept[block]
        if inside.any() and (~inside).any():
            assert products[np.ix_(~inside, inside)].max(axis=1).min() >= cut
        if inside.sum() > 1:
            among = products[np.ix_(inside, inside)]
            assert among[~np.eye(len(among), dtype=bool)].max() <= cut


def test_a_chain_of_near_duplicates_does_not_fall_to_its_first_link():
    angles = np.deg2rad(np.arange(0, 100, 10))
    vectors = quantise(np.stack([np.cos(angles), np.sin(angles)], axis=1))[0]
    found = redundancies(vectors, np.arange(10), 16, 0)
    kept = np.flatnonzero(keep(found.redundancy, np.arange(10), np.ones(10, dtype=np.int64), 0.3))
    assert kept.tolist() == [0, 4, 9] or kept.tolist() == [0, 5, 9]
    similar = [float(similarity(vectors[a].astype(float) @ vectors[a + 1])) for a in range(9)]
    assert min(similar) > 0.98  # a threshold on the nearest earlier row at 0.98 would keep row 0 alone


@settings(max_examples=60, deadline=None)
@given(
    copies=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    proportion=st.floats(0.001, 1),
    seed=st.integers(0, 99),
)
def test_the_proportion_is_met_to_the_row_and_further_copies_go_first(copies, proportion, seed):
    counts = np.array(copies, dtype=np.int64)
    rng = np.random.default_rng(seed)
    kept = keep(rng.random(len(counts)).astype(np.float32), rng.permutation(len(counts)), counts, proportion)
    assert kept.sum() == max(1, round(proportion * counts.sum()))
    assert (kept >= 0).all()
    assert (kept <= counts).all()
    assert (kept > 0).all() or kept.max() <= 1


def test_the_more_similar_prompt_goes():
    vectors = quantise(np.array([[1, 0], [0.999, 0.01], [0, 1], [-1, 0]]))[0]
    found = redundancies(vectors, np.arange(4), 16, 0)
    kept = keep(found.redundancy, np.arange(4), np.ones(4, dtype=np.int64), 0.75)
    assert kept.tolist() == [1, 0, 1, 1]
    assert found.nearest[1] == 0


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_pruning_covers_better_than_a_random_subset_of_the_same_size(share):
    from flywheel_tasks.curation.coverage import measure

    vectors = quantise(blobs(1200, 4))[0]
    order = np.random.default_rng(1).permutation(1200)
    ones = np.ones(1200, dtype=np.int64)
    found = redundancies(vectors, order, 256, 1)
    report = measure(vectors, found.blocks, ones, keep(found.redundancy, order, ones, share), 1)
    pruned, chance = report["coverage"]["after"], report["coverage"]["random_subset"]
    assert pruned["least_similarity_to_kept"] > chance["least_similarity_to_kept"]
    assert (
        report["redundancy"]["after"]["mean_nearest_similarity"]
        < report["redundancy"]["random_subset"]["mean_nearest_similarity"]
    )
