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
    chosen = selection.choose(prompt, reward, selection.ranking(prompt, reward, {}, {}), tau)
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
    rank = selection.ranking(prompt, reward, signal, {"continue": 1.0})
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
    prompt, reward = np.zeros(4, np.int64), np.array([1.0, 2.0, 3.0, np.nan])
    signal = {"continue": np.array([0.1, np.nan, 0.9, 0.5])}
    rank = selection.ranking(prompt, reward, signal, {"continue": 1.0})
    assert np.isfinite(rank).tolist() == [True, True, True, False]
    assert rank[1] == pytest.approx(selection.ranking(prompt, reward, {}, {})[1])


GRID = st.integers(-40, 40).map(lambda n: n / 8) | st.just(float("nan"))
"""Rewards far enough apart for their order to survive a constant of 1,000."""


@given(st.integers(1, 5), st.integers(2, 5), st.data())
def test_the_choice_is_blind_to_what_eq_1_leaves_open(prompts: int, k: int, data: st.DataObject) -> None:
    """A constant of a prompt added to all its rewards, or to all values of a signal, changes nothing."""
    prompt = np.repeat(np.arange(prompts), k)
    draw = [data.draw(arrays(np.float64, prompts * k, elements=GRID)) for _ in range(2)]
    moves = [data.draw(arrays(np.float64, prompts, elements=st.integers(-1000, 1000)))[prompt] for _ in range(2)]
    weights = {"continue": 0.25}

    def ranked(reward: np.ndarray, signal: np.ndarray) -> np.ndarray:
        return selection.ranking(prompt, reward, {"continue": signal}, weights)

    before, after = ranked(*draw), ranked(*(values + move for values, move in zip(draw, moves, strict=True)))
    np.testing.assert_allclose(after, before, atol=1e-6)
    bar = np.full(prompts, -np.inf)
    for number, (one, other) in enumerate(
        zip(*(selection.choose(prompt, draw[0], rank, bar) for rank in (before, after)), strict=True)
    ):
        assert one == other or before[other] == pytest.approx(before[one], abs=1e-6), number


def test_signals_of_a_quarter_s_weight_leave_the_reward_in_charge_whatever_the_prompts() -> None:
    """Rewards whose prompts differ by five times what their responses do: the reward's own best is mostly kept."""
    rng, prompts, k = np.random.default_rng(0), 500, 8
    prompt = np.repeat(np.arange(prompts), k)
    reward, signal = rng.normal(size=prompts * k), rng.normal(0.3, 0.02, size=prompts * k)
    moved = reward + 5 * rng.normal(size=prompts)[prompt]
    signals, weights = {"continue": signal, "thumb_up": signal}, {"continue": 0.25, "thumb_up": 0.25}
    rank = selection.ranking(prompt, moved, signals, weights)
    kept = selection.choose(prompt, moved, rank, np.full(prompts, -np.inf))
    assert (kept == selection.best(prompt, reward, prompts)).mean() > 0.5
