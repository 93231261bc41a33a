"""Table 8's numbers: accuracy by mode and batch, blind baselines, losses on old batches, calibration."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from flywheel_tasks.preherding import accuracy


def pairs(n: int = 300, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    pick = lambda *names: rng.choice(np.array(names, object), n)  # noqa: E731
    return pa.table(
        {
            "mode": pick("static", "interactive"),
            "batch": pick("261102", "261109", "261116"),
            "character_id": pick(*(f"c{i}" for i in range(30))),
            "chosen": pick("a longer answer 😀", "short"),
            "rejected": pick("short", "a longer answer"),
        }
    )


def test_every_pair_is_counted_once_in_its_batch_and_once_in_all() -> None:
    table = pairs()
    outcomes = np.random.default_rng(1).choice([0.0, 0.5, 1.0], 300)
    cells = accuracy.by_batch(table, outcomes, "RM_261116")
    total = {kind: sum(c["n"] for c in cells if (c["batch"] == "all") is kind) for kind in (True, False)}
    assert total == {True: 300, False: 300}
    assert all(c["low"] <= c["accuracy"] <= c["high"] for c in cells)
    static = np.array(table["mode"].to_pylist()) == "static"
    whole = next(c for c in cells if (c["mode"], c["batch"]) == ("static", "all"))
    assert whole["accuracy"] == pytest.approx(outcomes[static].mean())


def test_blind_baselines_read_length_and_emoji_alone() -> None:
    table = pa.table({"chosen": ["long text", "x", "same"], "rejected": ["x", "x 😀", "emas"]})
    found = accuracy.baselines(table)
    assert found["longer_wins"].tolist() == [1.0, 0.0, 0.5]
    assert found["more_emoji_wins"].tolist() == [0.5, 0.0, 0.5]


def test_a_loss_on_an_old_batch_is_seen_and_chance_is_not_taken_for_one() -> None:
    table, rng = pairs(), np.random.default_rng(2)
    before = np.ones(300)
    now = np.where(np.array(table["batch"].to_pylist()) == "261102", (rng.random(300) < 0.6).astype(float), 1.0)
    found = accuracy.drops(table, before, now, newest="261116")
    assert {(d["batch"], d["low"] > 0.03) for d in found} == {("261102", True), ("261109", False)}
    noise = np.where(rng.random(300) < 0.02, 0.0, 1.0)
    assert not any(d["low"] > 0 for d in accuracy.drops(table, before, noise, newest="261116"))


def test_calibration_of_an_honest_margin_is_close_and_of_an_overconfident_one_is_not() -> None:
    rng = np.random.default_rng(5)
    true = np.abs(rng.normal(0, 1.2, 20_000))
    wins = rng.random(true.size) < 1 / (1 + np.exp(-true))
    margin = np.where(wins, true, -true)
    honest, overconfident = accuracy.calibration(margin), accuracy.calibration(4 * margin)
    assert honest["expected_calibration_error"] < 0.01 < 0.1 < overconfident["expected_calibration_error"]
    assert sum(point["n"] for point in honest["curve"]) == 40_000
