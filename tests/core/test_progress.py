"""A task log says now and then how far a stage is, how fast, and how long it still takes."""

from __future__ import annotations

import pytest

from flywheel_tasks.core import progress


@pytest.mark.parametrize(
    ("done", "total", "rate", "said"),
    [
        (40_000, 100_000, 2_500, "40,000 of 100,000 rows (40%), 2,500 rows/s, 24 s left"),
        (3, 12, 1.5, "3 of 12 rows (25%), 1.5 rows/s, 6 s left"),
        (5, 30, 0.05, "5 of 30 rows (17%), 20 s each, 8 min left"),
        (12, 12, 1.5, "12 of 12 rows (100%), 1.5 rows/s, 0 s left"),
        (0, 12, 0.0, "0 of 12 rows (0%)"),
    ],
)
def test_a_line_is_read_without_a_calculator(done: float, total: float, rate: float, said: str) -> None:
    assert progress.line(done, total, "rows", rate) == said


def test_the_time_that_models_take_to_load_is_not_expected_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A first step after 100 s of loading, then one every 5 s."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    shown = progress.Progress("rl")
    for step in range(1, 11):
        clock[0] = 100.0 + 5 * (step - 1)
        shown.update(step, 20, "steps")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "rl: 1 of 20 steps (5%), 100 s each, 32 min left"
    assert lines[1:] == [
        "rl: 4 of 20 steps (20%), 5 s each, 80 s left",
        "rl: 7 of 20 steps (35%), 5 s each, 65 s left",
        "rl: 10 of 20 steps (50%), 5 s each, 50 s left",
    ]
