"""Algorithm 1 on arrays: against brute force, and against what order statistics say of k uniform rewards."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flywheel_tasks.preherding import selection
from flywheel_tasks.preherding.selection import NONE

SCORES = st.floats(-5, 5) | st.just(float("nan"))


@given(st.integers(1, 6), st.integers(1, 5), st.data())
def test_the_choice_is_algorithm_1s(prompts: int, k: int, data: st.DataObject) -> None:
    reward = data.draw(arrays(np.float64, prompts * k, elements=SCORES))
    tau = data.draw(arrays(np.float64, prompts, elements=st.floats(-5, 5)))
    prompt = np.repeat(np.arange(prompts), k)
    chosen = selection.choose(prompt, reward, selection.ranking(reward, {}, {}), tau)
    for number in range(prompts):
        mine = {row: reward[row] for row in np.flatnonzero(prompt == number) if reward[row] >= tau[number]}
        expected = max(mine, key=lambda row: (mine[row], -row)) if mine else NONE
        if mine and mine[chosen[number]] == max(mine.values()):
            assert reward[chosen[number]] >= tau[number]
        else:
            assert chosen[number] == expected


def test_a_signal_decides_between_equal_rewards_and_never_lifts_one_over_the_bar() -> None:
    prompt, reward = np.array([0, 0, 0]), np.array([1.0, 1.0, 0.2])
    signal = {"continue": np.array([0.1, 0.6, 0.99])}
    rank = selection.ranking(reward, signal, {"continue": 1.0})
    assert selection.choose(prompt, reward, rank, np.array([0.5])).tolist() == [1]
    assert selection.choose(prompt, reward, rank, np.array([1.5])).tolist() == [NONE]


def test_quantiles_of_each_segment_keep_the_same_share_everywhere() -> None:
    rng = np.random.default_rng(0)
    highest = np.concatenate([rng.normal(0, 1, 400), rng.normal(5, 1, 400)])
    segment = ["low"] * 400 + ["high"] * 400
    kept = highest >= selection.thresholds(highest, segment, quantile=0.75)
    assert (kept[:400].sum(), kept[400:].sum()) == (100, 100)
    together = highest >= selection.thresholds(highest, ["all"] * 800, quantile=0.75)
    assert together[:400].sum() == 0


def test_best_of_k_of_a_known_distribution_is_the_analytic_one() -> None:
    """The largest of j uniform rewards has mean j / (j + 1)."""
    reward, k = np.random.default_rng(1).random(40_000 * 8), 8
    found = selection.best_of(reward, k)
    expected = [j / (j + 1) for j in range(1, k + 1)]
    assert found == pytest.approx(expected, abs=4 * 0.29 / np.sqrt(40_000))


@given(arrays(np.float64, 12, elements=st.floats(-3, 3)))
def test_best_of_j_is_the_mean_over_all_choices_of_j(reward: np.ndarray) -> None:
    found = selection.best_of(reward, 4)
    for j in range(1, 5):
        every = [np.max(c) for row in reward.reshape(-1, 4) for c in combinations(row, j)]
        assert found[j - 1] == pytest.approx(np.mean(every))


def test_failed_responses_are_in_no_curve() -> None:
    assert selection.best_of(np.array([1.0, np.nan, 2.0, 4.0]), 2) == [3.0, 4.0]
    assert selection.best_of(np.array([np.nan, 1.0]), 2) == []


def test_a_missing_signal_neither_helps_nor_harms() -> None:
    reward = np.array([1.0, 2.0, 3.0, np.nan])
    rank = selection.ranking(reward, {"continue": np.array([0.1, np.nan, 0.9, 0.5])}, {"continue": 1.0})
    assert np.isfinite(rank).tolist() == [True, True, True, False]
    assert rank[1] == pytest.approx(selection.ranking(reward, {}, {})[1])
