"""The climb's A/B week: how much deeper conversations get when replies are answered more often."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.climb_wheel import MOST_TURNS, mean_depth


def test_nobody_answers_or_everybody_does():
    assert mean_depth(np.array([0.0])) == 1
    assert mean_depth(np.array([1.0])) == MOST_TURNS


def test_it_is_what_people_drawn_one_by_one_do():
    rng = np.random.default_rng(5)
    chances = rng.uniform(0.1, 0.99, 40)
    stays = rng.random((4000, 40, MOST_TURNS - 1)) < chances[None, :, None]
    turns = 1 + np.cumprod(stays, axis=2).sum(axis=2)
    assert abs(mean_depth(chances) - turns.mean()) < 4 * turns.std() / turns.size**0.5


@given(st.lists(st.floats(0, 0.99), min_size=1, max_size=30), st.floats(0, 0.01))
def test_who_answers_more_often_talks_longer(chances: list[float], more: float):
    assert mean_depth(np.array(chances) + more) >= mean_depth(np.array(chances)) - 1e-12
