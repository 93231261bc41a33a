"""Blocks of close prompts stay small, are exact, and depend on nothing but rows, order and seed."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel_tasks.curation.cluster import SCALE, fit, partition, quantise, similarity
from tests.curation.curation_runs import blobs


def test_products_of_quantised_rows_are_exact_in_float32_even_when_all_terms_align():
    rng = np.random.default_rng(0)
    for width in (3, 384, 2048):
        rows, valid = quantise(
            np.vstack([np.ones(width), -np.ones(width), np.eye(width)[0], rng.normal(size=(50, width))])
        )
        assert valid.all()
        truth = rows.astype(np.int64) @ rows.astype(np.int64).T
        assert np.array_equal((rows.astype(np.float32) @ rows.astype(np.float32).T).astype(np.int64), truth)
        assert np.abs(truth).max() < 2**24


def test_quantised_cosine_is_the_cosine():
    vectors = np.random.default_rng(1).normal(size=(200, 384))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = quantise(vectors)[0].astype(np.float32)
    assert np.abs(similarity(rows @ rows.T) - unit @ unit.T).max() < 5e-4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 0.0])
def test_a_row_without_a_direction_is_flagged_and_disturbs_no_other(bad):
    vectors = np.random.default_rng(2).normal(size=(5, 8))
    clean = quantise(vectors)[0]
    vectors[3] = bad
    rows, valid = quantise(vectors)
    assert valid.tolist() == [True, True, True, False, True]
    assert np.array_equal(np.delete(rows, 3, axis=0), np.delete(clean, 3, axis=0))
    assert not rows[3].any()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 700),
    cap=st.integers(4, 64),
    seed=st.integers(0, 2**31 - 1),
    one=st.floats(0, 1),
    same=st.booleans(),
)
def test_every_row_is_in_exactly_one_block_and_no_block_is_above_the_cap(rows, cap, seed, one, same):
    vectors = np.ones((rows, 32)) if same else blobs(rows, seed % 1000, share_in_one=one)
    order = np.random.default_rng(seed).permutation(rows)
    blocks = list(partition(quantise(vectors.reshape(rows, 32))[0], order, cap, seed))
    assert all(len(block) <= cap for _, block in blocks)
    assert sorted(row for _, block in blocks for row in block) == list(range(rows))


def test_one_huge_cluster_is_cut_into_blocks_that_hold_near_duplicates_together():
    rng = np.random.default_rng(3)
    originals = blobs(3000, share_in_one=0.95, width=64)
    vectors = np.vstack([originals, originals + rng.normal(size=originals.shape) * 0.001])
    block_of = np.empty(6000, dtype=int)
    for number, (_, rows) in enumerate(partition(quantise(vectors)[0], rng.permutation(6000), 256, 0)):
        block_of[rows] = number
    assert (block_of[:3000] == block_of[3000:]).mean() > 0.97


def test_rows_that_all_coincide_are_still_cut():
    blocks = list(partition(quantise(np.ones((1000, 16)))[0], np.arange(1000), 100, 0))
    assert len(blocks) >= 10
    assert max(len(rows) for _, rows in blocks) <= 100


def test_centroids_are_unit_length():
    centroids = fit(quantise(blobs(500))[0].astype(np.float32), 8, 5)
    assert np.allclose(np.linalg.norm(centroids, axis=1), SCALE, rtol=1e-3)


def _digest() -> str:
    rows = quantise(blobs(4000, width=64))[0]
    blocks = partition(rows, np.random.default_rng(0).permutation(4000), 128, 7)
    return hashlib.sha256(b"".join(number.to_bytes(4, "big") + rows.tobytes() for number, rows in blocks)).hexdigest()


def test_blocks_are_the_same_for_any_number_of_threads():
    code = "from tests.curation.test_cluster import _digest; print(_digest())"
    found = set()
    for threads in ("1", "3"):
        env = os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        root = Path(__file__).parents[2]
        found.add(
            subprocess.run(
                [sys.executable, "-c", code], env=env, cwd=root, check=True, capture_output=True, text=True
            ).stdout
        )
    assert len(found) == 1
