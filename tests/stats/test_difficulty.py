"""Difficulty is variance: Sec. 3.5.4, with the bias of the mean reproduced on synthetic scores."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.stats.difficulty import by_prompt, hardest, over_representation

JOBS = np.array(["small_talk", "information_seeking", "role_play_adventure", "role_play_romantic"], dtype=object)


def _scored(shift_of_role_play: float, seed: int = 0) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """4,000 prompts x 8 responses. How hard a prompt is (the spread of its scores) has nothing to do with its job;
    role-play scores are lower across the board, as those of long conversations are."""
    rng = np.random.default_rng(seed)
    job = rng.choice(JOBS, size=4000, p=[0.5, 0.3, 0.1, 0.1])
    spread = rng.gamma(4.0, 0.1, 4000)
    shift = np.where(np.char.startswith(job.astype(str), "role_play"), shift_of_role_play, 0.0)
    scores = shift[:, None] + rng.normal(0, 0.5, (4000, 1)) + spread[:, None] * rng.normal(size=(4000, 8))
    ids = np.repeat([f"p{i:04d}" for i in range(4000)], 8)
    return by_prompt(pa.chunked_array([pa.array(ids)]), pa.chunked_array([scores.ravel()])), job, spread


def _chosen(scored: pa.Table, by: str, count: int = 800) -> np.ndarray:
    chosen = np.zeros(4000, dtype=bool)
    chosen[[int(name[1:]) for name in hardest(scored, count, by).to_pylist()]] = True
    return chosen


def test_selecting_by_mean_over_represents_role_play_four_times_and_by_variance_not():
    scored, job, _ = _scored(-1.2)
    by_mean = over_representation(job, _chosen(scored, "mean"))
    by_variance = over_representation(job, _chosen(scored, "variance"))
    for name in ("role_play_adventure", "role_play_romantic"):
        assert 3.5 < by_mean[name] < 4.6
        assert 0.8 < by_variance[name] < 1.2


def test_variance_finds_the_prompts_that_are_hard():
    scored, _, spread = _scored(-1.2)
    truly = spread >= np.quantile(spread, 0.8)
    assert truly[_chosen(scored, "variance")].mean() > 0.55
    assert truly[_chosen(scored, "mean")].mean() < 0.3


@settings(max_examples=50)
@given(
    scores=st.lists(st.floats(-10, 10), min_size=2, max_size=12),
    shift=st.floats(-1000, 1000),
)
def test_a_shift_of_all_scores_of_a_prompt_changes_its_mean_and_not_its_difficulty(scores, shift):
    ids = ["a"] * len(scores) + ["b"] * len(scores)
    both = by_prompt(pa.chunked_array([ids]), pa.chunked_array([scores + [s + shift for s in scores]]))
    a, b = both.sort_by("prompt_id")["difficulty"].to_pylist()
    assert a == pytest.approx(np.var(scores, ddof=1), abs=1e-9)
    assert b == pytest.approx(a, abs=1e-6)


def test_one_response_has_no_variance_and_broken_scores_do_not_count():
    ids = ["one", "two", "two", "two", "none"]
    scored = by_prompt(pa.chunked_array([ids]), pa.chunked_array([[1.0, 1.0, 3.0, float("nan"), None]])).sort_by(
        "prompt_id"
    )
    assert scored.to_pylist() == [
        {"prompt_id": "one", "responses": 1, "quality": 1.0, "difficulty": None},
        {"prompt_id": "two", "responses": 2, "quality": 2.0, "difficulty": 2.0},
    ]
    assert hardest(scored, 1).to_pylist() == ["two"]
    with pytest.raises(InputError, match="only 1 have scores"):
        hardest(scored, 2)
