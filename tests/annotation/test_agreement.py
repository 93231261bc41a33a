from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flywheel_tasks.annotation.agreement import against_others, agreement, counted, krippendorff_alpha

# Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability", section C: four observers, twelve units, values
# missing; the text gives .743 for nominal data. 0 stands for a missing value.
PUBLISHED = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
        [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
    ]
)


def reviews(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit and label of every value of an observers × units matrix."""
    observer, unit = np.nonzero(matrix)
    return unit, matrix[observer, unit] - 1


def by_definition(matrix: np.ndarray) -> float:
    """Alpha from all pairs of values, as the definition says: observed over expected disagreement."""
    units = [[v for v in column if v] for column in matrix.T]
    units = [values for values in units if len(values) > 1]
    everything = [v for values in units for v in values]
    n = len(everything)
    observed = sum(sum(a != b for a, b in itertools.permutations(values, 2)) / (len(values) - 1) for values in units)
    expected = sum(a != b for a, b in itertools.permutations(everything, 2)) / (n - 1) if n > 1 else 0
    return 1 - observed / expected if expected else float("nan")


def test_alpha_is_the_published_one() -> None:
    unit, label = reviews(PUBLISHED)
    assert krippendorff_alpha(counted(unit, label, 12, 5)) == pytest.approx(0.743, abs=5e-4)


@given(arrays(np.int64, st.tuples(st.integers(1, 5), st.integers(1, 7)), elements=st.integers(0, 3)))
def test_alpha_follows_its_definition_for_any_pattern_of_missing_values(matrix: np.ndarray) -> None:
    unit, label = reviews(matrix)
    ours, theirs = krippendorff_alpha(counted(unit, label, matrix.shape[1], 3)), by_definition(matrix)
    assert ours == pytest.approx(theirs, nan_ok=True)


def test_alpha_agrees_with_the_reference_implementation() -> None:
    reference = pytest.importorskip("krippendorff", reason="the reference implementation is not installed")
    rng = np.random.default_rng(3)
    truth = rng.integers(1, 4, 400)
    matrix = np.where(rng.random((6, 400)) < 0.7, truth, rng.integers(1, 4, (6, 400)))
    matrix[rng.random(matrix.shape) < 0.3] = 0
    unit, label = reviews(matrix)
    theirs = reference.alpha(np.where(matrix, matrix, np.nan), level_of_measurement="nominal")
    assert krippendorff_alpha(counted(unit, label, 400, 3)) == pytest.approx(theirs, abs=1e-12)


def test_the_interval_holds_the_true_alpha_about_as_often_as_it_says() -> None:
    """Two labels, three annotators, each right with 0.85: alpha of the population is (2 · 0.85 − 1)²."""
    rng = np.random.default_rng(8)
    inside = 0
    for run in range(60):
        truth = rng.integers(0, 2, 150)
        label = np.where(rng.random((3, 150)) < 0.85, truth, 1 - truth)
        found = agreement(counted(np.tile(np.arange(150), 3), label.ravel(), 150, 2), seed=run)
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= 0.49 <= found.high
    assert 51 <= inside <= 60


def test_agreement_of_everybody_and_of_nobody() -> None:
    unit = np.repeat(np.arange(4), 3)
    everybody = agreement(counted(unit, np.repeat([0, 1, 0, 1], 3), 4, 2))
    assert (everybody.raw, everybody.unanimous, everybody.alpha) == (1.0, 1.0, 1.0)
    same_label = agreement(counted(unit, np.zeros(12, int), 4, 2))
    assert same_label.raw == 1.0
    assert same_label.alpha is None, "agreement by never using another label is no reliability"
    lone = agreement(counted(np.arange(4), np.zeros(4, int), 4, 2))
    assert (lone.units, lone.raw, lone.alpha) == (0, None, None)


def test_each_review_is_compared_with_the_others_of_its_unit() -> None:
    unit, label = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    shares = against_others(unit, label, counted(unit, label, 2, 2))
    assert shares[:3].tolist() == [0.5, 0.5, 0.0]
    assert np.isnan(shares[3])
