"""What the benchmark of the climb rests on: a reward that is what it is said to be, and an interval over few seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.bench_rises import USUAL, interval, note
from benchmarks.counting import counting, vowels
from flywheel_tasks.models.score import Scorer, ScoreRow

TURNS = [{"role": "user", "content": "Which letters do you like?"}]


def test_the_score_is_the_mean_worth_of_the_tokens_and_vowels_alone_are_best(tiny_model: Path, tmp_path: Path) -> None:
    scorer = Scorer(counting(tiny_model, tmp_path / "reward", lambda text: vowels(text) - USUAL))
    tokenizer, said = scorer.template.tokenizer, ["zzzzzzzz", "All of them, I think.", "aeiouaeiou"]
    expected = []
    for response in said:
        ids = scorer.template.chat(TURNS, response=response).ids
        expected.append(
            np.mean([0 if i in tokenizer.all_special_ids else vowels(tokenizer.decode([i])) - USUAL for i in ids])
        )
    found = scorer.pointwise([ScoreRow(TURNS, response) for response in said])
    assert found / 100 == pytest.approx(expected, rel=0.02, abs=5e-4)
    assert list(np.argsort(found)) == [0, 1, 2]


def test_three_gains_alike_are_sure_and_three_that_differ_widely_are_not() -> None:
    low, high = interval([1.0, 2.0, 3.0])  # Student's quantile for two degrees of freedom is 4.303
    assert (low, high) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), abs=1e-3)

    def told(*gains: float) -> str:
        share = {"vowels_before": 0.3, "vowels_after": 0.4}
        return note("GRPO", [{"seed": seed, "gain": gain, **share} for seed, gain in enumerate(gains)])

    assert told(1.0, 1.1, 0.9).endswith(": it rises")
    assert told(1.0, 2.0, 0.1).endswith(": not shown to rise")
    assert told(-1.0, -1.1, -0.9).endswith(": not shown to rise")
    assert told(1.0).endswith("one seed has no interval")
