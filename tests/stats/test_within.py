"""Spread within prompts: numpy's own for one prompt, and blind to any constant of a prompt."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flywheel_tasks.stats import within

VALUES = arrays(np.float64, 12, elements=st.floats(-5, 5))


@given(VALUES)
def test_one_prompt_is_numpys_own(values: np.ndarray) -> None:
    assert within.spread(np.zeros(12, np.int64), values) == pytest.approx(values.std(ddof=1), abs=1e-8)


@given(VALUES, arrays(np.float64, 3, elements=st.floats(-100, 100)))
def test_a_constant_of_a_prompt_changes_nothing(values: np.ndarray, constants: np.ndarray) -> None:
    prompt = np.arange(12) % 3
    moved = values + constants[prompt]
    np.testing.assert_allclose(within.deviations(prompt, moved), within.deviations(prompt, values), atol=1e-9)
    assert within.spread(prompt, moved) == pytest.approx(within.spread(prompt, values), abs=1e-6)


def test_prompts_are_pooled_by_what_each_one_tells() -> None:
    prompt = np.array([0, 0, 1, 1, 1, 2])
    values = np.array([0.0, 2.0, 10.0, 11.0, 12.0, 99.0])
    assert within.spread(prompt, values) == pytest.approx(np.sqrt((2 + 2) / 3))
    assert within.deviations(prompt, values).tolist() == [-1, 1, -1, 0, 1, 0]


def test_what_is_missing_is_left_out_and_stays_missing() -> None:
    prompt, values = np.array([0, 0, 0, 1]), np.array([1.0, np.nan, 3.0, np.nan])
    assert within.spread(prompt, values) == pytest.approx(np.sqrt(2))
    np.testing.assert_equal(within.deviations(prompt, values), [-1.0, np.nan, 1.0, np.nan])


@pytest.mark.parametrize(
    ("prompt", "values"), [([0, 1, 2], [1.0, 2, 3]), ([0, 0, 0], [0.1, 0.1, 0.1]), ([], []), ([0, 0], [np.nan, 1])]
)
def test_nothing_to_tell_apart_is_no_spread(prompt: list[int], values: list[float]) -> None:
    assert within.spread(np.array(prompt, np.int64), np.array(values, np.float64)) == 0.0
