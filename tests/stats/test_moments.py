"""Exact sums: parity with Python integers past 2^63, independence of any split."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel_tasks.stats.moments import BLOCK, Moments, dot, estimate, moments

counts = st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 100), max_size=60)


@given(counts)
def test_sums_are_those_of_python_integers(values: list[int]) -> None:
    m = moments(np.array(values, np.int64))
    assert m == Moments(len(values), sum(values), sum(v * v for v in values))


@given(counts, st.integers(0, 60))
def test_any_split_gives_the_same_moments(values: list[int], cut: int) -> None:
    x = np.array(values, np.int64)
    assert moments(x[cut:]).plus(moments(x[:cut])) == moments(x)


def test_long_vectors_past_one_block() -> None:
    x = np.full(2 * BLOCK + 7, 2**62, np.int64)
    assert moments(x) == Moments(len(x), len(x) * 2**62, len(x) * 2**124)
    y = np.arange(len(x), dtype=np.int64)
    assert dot(x, y) == 2**62 * int(y.sum())


def test_an_offset_of_1e9_keeps_the_variance() -> None:
    """The float formula E[x^2] - E[x]^2 loses every digit here."""
    rng = np.random.default_rng(1)
    x = rng.integers(0, 5, 10_000)
    plain, moved = estimate(moments(x)), estimate(moments(x + 10**9))
    assert moved.se2 == plain.se2
    assert plain.se2 == pytest.approx(x.var(ddof=1) / len(x), rel=1e-12)


def test_estimates_round_once_and_know_when_there_is_none() -> None:
    e = estimate(Moments(3, 10, 42), scale=7)
    assert e.mean == float(Fraction(10, 21))
    assert e.se2 == float(Fraction(3 * 42 - 100, 3 * 3 * 2 * 49))
    assert estimate(Moments(1, 5, 25)) == (1, 5.0, None)
    assert estimate(Moments()) == (0, None, None)
