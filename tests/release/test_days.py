"""Which days are there, and what a readout says while they are not."""

from pathlib import Path

import pytest

from flywheel_tasks.release.readout_cli import read_out_files
from flywheel_tasks.stats.sequential import equal_looks, obrien_fleming
from tests.release.worlds import Rows, at, day, reference, settings, tweak, world, write


def test_missing_days_may_be_declared(tmp_path: Path) -> None:
    exposures, activity = world(7, staggered=False)
    without = [a for a in activity if a[1] != day(3)]
    files = write(tmp_path, exposures, without)
    refused = read_out_files(*files, settings())
    assert refused.status == "refused"
    assert str(day(3)) in refused.problems[0]
    declared = read_out_files(*files, settings(missing_days=(day(3),)))
    assert declared.status == "closed"
    assert "without 2026-11-05" in declared.estimand
    expected = reference(exposures, without, "calendar_window")["test"]["breadth"][1]
    assert declared.arms["test"]["breadth"].mean == pytest.approx(expected * 7 / 6)


def test_a_day_missing_in_one_arm_is_refused(tmp_path: Path) -> None:
    tested = {u for u, arm, _ in world(8, staggered=False)[0] if arm == "test"}
    found = tweak(lambda e, a: (e, [x for x in a if not (x[1] == day(2) and x[0] in tested)]), tmp_path)
    assert found.status == "refused"
    assert found.problems == [f"{day(2)} has no active unit in arm 'test'"]


def test_late_data_is_refused(tmp_path: Path) -> None:
    found = tweak(lambda e, a: (e, [x for i, x in enumerate(a) if x[1] != day(6) or i % 8 == 0]), tmp_path)
    assert found.status == "refused"
    assert all("late data" in p for p in found.problems)


@pytest.mark.parametrize("estimand", ["calendar_window", "per_user_window"])
def test_the_decay_of_retention_is_not_late_data(tmp_path: Path, estimand: str) -> None:
    """Every unit is active on the day of its exposure and few a week later: no day is far below its neighbours."""
    retained = (1, 0.35, 0.25, 0.2, 0.16, 0.12, 0.09, 0.09)
    exposures = [(i, "test" if i % 2 else "control", at(0)) for i in range(4000)]
    activity = [(i, day(d), 1 + i % 3) for d, r in enumerate(retained) for i in range(4000) if (i // 2) % 100 < 100 * r]
    found = read_out_files(*write(tmp_path, exposures, activity), settings(estimand=estimand))
    assert found.status == "closed", found.problems


@pytest.mark.parametrize("late", [{6}, {5, 6}, {2}, {0}])
def test_late_days_are_found_wherever_they_are(tmp_path: Path, late: set[int]) -> None:
    retained = (0.6, 0.5, 0.45, 0.42, 0.4, 0.38, 0.37, 0.37)
    exposures = [(i, "test" if i % 2 else "control", at(-1)) for i in range(4000)]
    activity = [
        (i, day(d), 1 + i % 3)
        for d, r in enumerate(retained)
        for i in range(4000)
        if (i // 2) % 100 < 100 * (r / 4 if d in late else r)
    ]
    found = read_out_files(*write(tmp_path, exposures, activity), settings())
    assert found.status == "refused"
    assert any("late data" in p and str(day(min(late))) in p for p in found.problems)


def test_an_open_window_is_running(tmp_path: Path) -> None:
    found = tweak(lambda e, a: (e, [x for x in a if x[1] < day(5)]), tmp_path)
    assert (found.status, found.comparisons) == ("running", [])
    waiting = tweak(lambda e, a: (e, [x for x in a if x[1] < day(9)]), tmp_path / "b", settle_days=2)
    assert waiting.status == "running"


def test_the_last_day_with_activity_closes_nothing_by_itself(tmp_path: Path) -> None:
    """It may still be filling up: only as_of, or a later day, says that it is whole."""

    def week(e: Rows, a: Rows) -> tuple[Rows, Rows]:
        return e, [x for x in a if x[1] < day(7)]

    found = tweak(week, tmp_path)
    assert found.status == "running"
    assert any("may be incomplete" in w for w in found.warnings)
    assert tweak(week, tmp_path / "b", as_of=day(7)).status == "closed"
    assert tweak(lambda e, a: (e, [x for x in a if x[1] < day(8)]), tmp_path / "c").status == "closed"


def test_as_of_adds_no_day_that_was_not_delivered(tmp_path: Path) -> None:
    """A daily run may be told that yesterday is complete while the activity it reads ends earlier."""
    found = tweak(lambda e, a: (e, [x for x in a if x[1] < day(5)]), tmp_path, as_of=day(20))
    assert found.status == "running"
    assert f"the activity ends on {day(4)}" in found.problems[0]


def test_a_running_readout_has_the_looks_so_far_and_no_decision(tmp_path: Path) -> None:
    found = tweak(lambda e, a: (e, a), tmp_path, as_of=day(4))
    assert (found.status, [d.verdict for d in found.decisions]) == ("running", ["hold"])
    looks = [x for x in found.novelty if x.metric == "breadth"]
    assert [x.day for x in looks] == [str(day(d)) for d in range(4)]
    assert [x.boundary for x in looks] == pytest.approx(obrien_fleming(equal_looks(7), 0.05)[:4])
    closed = tweak(lambda e, a: (e, a), tmp_path / "b", as_of=day(7))
    assert [x.z for x in looks] == [x.z for x in closed.novelty if x.metric == "breadth"][:4]
    broken = tweak(
        lambda e, a: ([x for i, x in enumerate(e) if x[1] == "test" or i % 2], a), tmp_path / "c", as_of=day(4)
    )
    assert (broken.status, broken.novelty) == ("running", [])
    assert "sample ratio" in broken.problems[1]
