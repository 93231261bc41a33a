"""expose: since when a unit is in an experiment, and that a week keeps to the draw it began with (Sec. 2.5.2)."""

from __future__ import annotations

from typing import Any

import pytest

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.store import Store
from flywheel_tasks.release import expose, ledger, readout
from flywheel_tasks.release.ledger import Change, Model
from tests.release.promotion_world import ledger_on
from tests.release.test_stages import HALF, INGEST, Cycle, cycle, exposures
from tests.release.worlds import day

__all__ = ["cycle"]
WEEK, NEXT = "2026-W45", "2026-W46"
RELEASE = {"experiments": [{"arms": HALF["arms"]}]}


def nominate(cycle: Cycle) -> None:
    model = Model(stage="dpo", key="a" * 32, output="model", sha256="0" * 64)
    ledger.append(Store(cycle.uri).storage, lambda _: Change("nominate", model, WEEK, "the gate", "x", "gate/x"))


def test_nobody_meets_a_candidate_before_it_was_nominated(cycle: Cycle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The week's ingest first holds the traffic of the days before: it exposes nobody, and the readout waits."""
    ledger_on(monkeypatch, day(2))
    nominate(cycle)
    cycle.run(INGEST, ingest={"days": 2})
    assert exposures(cycle.run(expose.STAGE, expose=RELEASE)) == []
    waits = cycle.run(readout.STAGE, expose=RELEASE).json("readout")
    assert (waits["status"], waits["window"]["first"]) == ("running", str(day(2)))
    assert waits["problems"] == [f"not every arm has a unit since {day(2)}: their activity is not there yet"]
    cycle.run(INGEST, ingest={"days": 9})
    log = exposures(cycle.run(expose.STAGE, expose=RELEASE))
    assert {row["exposed_at"].date() for row in log} == {day(2), day(3)}
    found = cycle.run(readout.STAGE, expose=RELEASE, readout={"as_of": str(day(9))}).json("readout")
    assert (found["status"], found["window"]["first"], found["window"]["last"]) == ("closed", str(day(2)), str(day(8)))
    early = {"as_of": str(day(9)), "start": str(day(1))}
    with pytest.raises(InputError, match=f"before its candidate was nominated: set readout.start to {day(2)}"):
        cycle.run(readout.STAGE, expose=RELEASE, readout=early)


def test_a_nomination_in_the_week_begins_its_release_anew(cycle: Cycle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then both arms had the champion: those days are no part of the test."""
    cycle.run(INGEST, ingest={"days": 3})
    assert {row["exposed_at"].date() for row in exposures(cycle.run(expose.STAGE, expose=RELEASE))} == {day(0), day(1)}
    ledger_on(monkeypatch, day(3))
    nominate(cycle)
    cycle.run(INGEST, ingest={"days": 6})
    log = exposures(cycle.run(expose.STAGE, expose=RELEASE))
    assert {row["exposed_at"].date() for row in log} == {day(3), day(4)}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"arms": {"test": 0.4, "control": 0.2}}, "shares"),
        ({"arms": {"test": 0.1, "control": 0.2}}, "shares"),
        ({"salt": "again"}, "salt"),
        ({"slice_to": 0.5}, "slice"),
        ({"layer": "other"}, "layer"),
    ],
)
def test_within_a_week_nobody_is_drawn_anew(cycle: Cycle, change: dict[str, Any], named: str) -> None:
    """The units served since Monday would leave the log, or those of Thursday stand in it since Monday."""
    began = HALF | {"arms": {"test": 0.2, "control": 0.2}}
    cycle.run(INGEST, ingest={"days": 3})
    first = exposures(cycle.run(expose.STAGE, expose={"experiments": [began]}))
    cycle.run(INGEST, ingest={"days": 5})
    with pytest.raises(InputError, match=f"experiment 'x' exposed units in this cycle with {named} = "):
        cycle.run(expose.STAGE, expose={"experiments": [began | change]})
    kept = exposures(cycle.run(expose.STAGE, expose={"experiments": [began]}))
    assert {row["unit_id"]: row for row in first}.items() <= {row["unit_id"]: row for row in kept}.items()


@pytest.mark.parametrize("change", [{"min_sends": 3}, {"start": str(day(1))}])
def test_within_a_week_nobody_becomes_eligible_or_ineligible_afterwards(cycle: Cycle, change: dict[str, Any]) -> None:
    cycle.run(INGEST, ingest={"days": 3})
    cycle.run(expose.STAGE, expose={"experiments": [HALF]})
    with pytest.raises(InputError, match=f"exposed units in this cycle with {next(iter(change))} = "):
        cycle.run(expose.STAGE, expose={"experiments": [HALF]} | change)


def test_the_places_that_an_arm_gained_are_served_from_the_week_on_that_gave_them(cycle: Cycle) -> None:
    """Logs may go back to the first day; the old users of a new place were not served then."""
    small, large = ({"experiments": [HALF | {"arms": {"test": share, "control": 0.2}}]} for share in (0.2, 0.4))
    cycle.run(INGEST, ingest={"days": 7})
    first = exposures(cycle.run(expose.STAGE, expose=small))
    for week, more in ((NEXT, {"days": 10}), ("2026-W47", {"days": 16, "units": 3300})):
        cycle.run(INGEST, week, ingest=more)
        log = exposures(cycle.run(expose.STAGE, week, expose=large))
        assert log[: len(first)] == first
        gained = {row["exposed_at"].date() for row in log[len(first) :]}
        assert gained == {day(7), day(8)}, "the second week's Monday and Tuesday, however late a unit's log comes"
