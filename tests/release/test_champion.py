"""A crown needs a fair test: the candidate in all of its window, and today's champion as control (Sec. 2.5.2)."""

from __future__ import annotations

import datetime as dt
from contextlib import nullcontext
from pathlib import Path

import pytest

from flywheel_tasks.core import ids
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.tracking import Tracker
from flywheel_tasks.release import champion, ledger
from tests.release.promotion_world import GATE, World, ledger_on

FIRST, SECOND = "2026-W47", "2026-W48"
MONDAY = ids.cycle_start(FIRST)


def day(n: int) -> dt.date:
    return MONDAY + dt.timedelta(days=n)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(Tracker, "watch", lambda self, record: nullcontext())
    ledger_on(monkeypatch, MONDAY)
    return World(tmp_path)


def reigning(world: World) -> str:
    return ledger.title(ledger.read(world.store.storage).champion)


def test_a_week_before_the_candidate_existed_crowns_nobody(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger_on(monkeypatch, day(2))
    world.promote("PASS")
    with pytest.raises(InputError, match=f"was nominated on {day(2)}: .* set readout.start to {day(2)} or later"):
        champion.crown(world.store, world.readout(first=str(day(1))))
    assert reigning(world) == "the base policy"
    assert champion.crown(world.store, world.readout(first=str(day(2))))


def test_a_gate_that_passes_the_candidate_again_does_not_end_its_test(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does when people's comparisons come in; a refusal in between does."""
    world.promote("PASS")
    readout = world.readout()
    responses = world.store.pointed(FIRST, "respond")
    assert responses
    model = champion.answered_as(responses, "candidate")
    for number, decision in enumerate(("PASS", "BLOCK", "PASS"), start=1):
        ledger_on(monkeypatch, day(number))
        champion.conclude(world.store, world.run(GATE, decision=decision, says=str(number)), model)
        nominated = ledger.read(world.store.storage).nomination(FIRST)
        assert (nominated and nominated.at.date()) == [day(0), None, day(3)][number - 1]
    with pytest.raises(InputError, match=f"was nominated on {day(3)}"):
        champion.crown(world.store, readout)


def test_a_candidate_is_crowned_only_over_the_champion_that_it_was_held_against(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.promote("PASS", FIRST, "a")
    world.promote("PASS", SECOND, "b")
    readout = world.readout(SECOND)
    assert readout.json("readout")["champion"] == "the base policy"
    assert champion.crown(world.store, world.readout(FIRST))
    first = reigning(world)
    with pytest.raises(InputError, match=f"was served the base policy and {first}, the champion is {first}"):
        champion.crown(world.store, readout)
    assert reigning(world) == first
    ledger_on(monkeypatch, day(8))
    again = world.readout(SECOND, first=str(day(1)), looked_on=8)
    assert again.json("readout")["champion"] == first
    assert champion.crown(world.store, again)


def test_a_rollback_in_the_middle_of_a_test_spoils_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one who reigned in the first days is not the one who reigns now, though the readout knows only the last."""
    world.promote("PASS", FIRST, "a")
    champion.crown(world.store, world.readout(FIRST))
    first = reigning(world)
    ledger_on(monkeypatch, day(7))
    world.promote("PASS", SECOND, "b")
    ledger_on(monkeypatch, day(10))
    champion.rollback(world.store, "ada", "complaints")
    with pytest.raises(InputError, match=f"was served the base policy and {first}, the champion is the base policy"):
        champion.crown(world.store, world.readout(SECOND))
    assert reigning(world) == "the base policy"


def test_who_was_crowned_on_the_day_before_the_nomination_came_is_the_control(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test may begin on the day on which the one before it is decided, if that comes first."""
    world.promote("PASS", FIRST, "a")
    ledger_on(monkeypatch, day(7), hour=8)
    champion.crown(world.store, world.readout(FIRST))
    ledger_on(monkeypatch, day(7), hour=15)
    world.promote("PASS", SECOND, "b")
    assert champion.crown(world.store, world.readout(SECOND))
