"""history: what the store knows of a version."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import date
from pathlib import Path

import pytest

from flywheel_tasks.core.tracking import Tracker
from flywheel_tasks.evaluation.figures import growth
from flywheel_tasks.evaluation.history import Number, _number, from_csv, of_cycle
from flywheel_tasks.release import champion
from tests.release.promotion_world import World, ledger_on


def test_the_lift_of_a_version_that_was_rolled_back_is_no_growth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tracker, "watch", lambda self, record: nullcontext())
    world, weeks = World(tmp_path), ("2026-W47", "2026-W48")
    for week, weights in zip(weeks, "ab", strict=True):
        world.promote("PASS", week, weights)
        assert champion.crown(world.store, world.readout(week))
    assert [of_cycle(world.store, week).released for week in weeks] == [True, True]
    champion.rollback(world.store, "ada", "complaints")
    versions = [of_cycle(world.store, week) for week in weeks]
    assert [v.released for v in versions] == [True, False]
    assert [bool(v.date) for v in versions] == [True, False]
    assert growth(versions, "breadth") == ([0], [pytest.approx(1.015)])


def test_a_release_has_the_day_of_its_crown_and_what_was_not_released_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tracker, "watch", lambda self, record: nullcontext())
    world = World(tmp_path)
    world.promote("BLOCK", "2026-W46", "a")
    world.promote("PASS", "2026-W47", "b")
    readout = world.readout("2026-W47")
    ledger_on(monkeypatch, date(2026, 12, 1))
    assert champion.crown(world.store, readout)
    assert [of_cycle(world.store, week).date for week in ("2026-W46", "2026-W47")] == ["", "2026-12-01"]


@pytest.mark.parametrize("can_gate", [True, False])
def test_a_number_of_a_judge_that_nobody_checked_says_why_it_cannot_decide(can_gate: bool) -> None:
    measured = {"value": 0.05, "low": 0.03, "high": 0.07, "n": 20, "can_gate": can_gate, "why": "unvalidated"}
    assert _number(measured, "value") == Number(0.05, 0.03, 0.07, 20, "" if can_gate else "unvalidated")


@pytest.mark.parametrize("tested", ["the candidate", "another", "unnamed"])
def test_a_test_of_no_candidate_or_of_another_gives_a_version_no_lift(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tested: str
) -> None:
    monkeypatch.setattr(Tracker, "watch", lambda self, record: nullcontext())
    world = World(tmp_path)
    world.promote("PASS", "2026-W47")
    world.readout("2026-W47", tested=tested)
    assert ("breadth" in of_cycle(world.store, "2026-W47").numbers) is (tested == "the candidate")


def test_a_share_and_its_interval_are_in_one_unit(tmp_path: Path) -> None:
    file = tmp_path / "history.csv"
    file.write_text(
        "version,rm_pointwise_user_win_pct,pointwise_user_ci_minus,pointwise_user_ci_plus\nV9,58,2,3\n", "utf-8"
    )
    (version,) = from_csv(file)
    number = version.numbers["pointwise_user"]
    assert (number.value, number.low, number.high) == pytest.approx((0.58, 0.56, 0.61))
