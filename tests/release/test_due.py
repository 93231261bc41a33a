"""Which release the daily readout is about: a candidate of mid-week is read until its window is closed."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest

from flywheel_tasks.core.store import Store
from flywheel_tasks.release import expose, ledger, readout
from flywheel_tasks.release.due import GIVEN_UP_AFTER, due
from flywheel_tasks.release.ledger import Action, Change, Model
from tests.release.promotion_world import ledger_on
from tests.release.test_stages import HALF, INGEST, Cycle
from tests.release.worlds import day

W45, W46, W47 = "2026-W45", "2026-W46", "2026-W47"
MODEL = Model(stage="dpo", key="a" * 32, output="model", sha256="0" * 64)
MONDAY, TUESDAY = 0, 1
"""Day 0 is the Monday of W45."""


@pytest.fixture
def cycle(tmp_path: Path) -> Cycle:
    return Cycle(tmp_path)


def write(store: Store, cycle: str, action: Action = "nominate", model: Model | None = MODEL) -> None:
    ledger.append(store.storage, lambda _: Change(action, model, cycle, "a test", "because", f"{action}/{cycle}"))


def test_daily_runs_close_a_release_that_was_nominated_on_a_tuesday(
    cycle: Cycle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody triggers anything: the log of the window's last day comes with the ingest of the week after next."""
    store, ingested, read = Store(cycle.uri), day(MONDAY), list[tuple[str, str]]()
    cycle.run(INGEST, W45, ingest={"days": 1})
    ledger_on(monkeypatch, day(TUESDAY))
    write(store, W45)
    for today in range(TUESDAY + 1, 16):
        if today % 7 == MONDAY:
            ingested = day(today)
            cycle.run(INGEST, f"2026-W{45 + today // 7}", ingest={"days": today + 1})
        found = due(store, day(today - 1), 7)
        assert found.ingest
        given = {"ingest": found.ingest.uri}
        sections = {
            "expose": {"experiments": [{"arms": HALF["arms"]}]},
            "readout": {"as_of": str(min(day(today), ingested))},
        }
        cycle.run(expose.STAGE, found.cycle, given, **sections)
        if found.cycle == W45:
            told = cycle.run(readout.STAGE, found.cycle, given, **sections).json("readout")
            assert told["experiment"] == f"release-{W45}"
            assert told["window"]["first"] == str(day(TUESDAY))
        read.append((found.cycle, told["status"]))
    assert read == [(W45, "running")] * 12 + [(W45, "closed"), (W47, "closed")]
    assert told["rows"]["units"] == 3000


def test_no_release_holds_up_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"file://{tmp_path}")
    for number, week in enumerate((W45, W46)):
        ledger_on(monkeypatch, day(7 * number + TUESDAY))
        write(store, week)
    assert {due(store, day(n), 7).cycle for n in (1, 2, 6, 7)} == {W45}
    both = [due(store, day(n), 7).cycle for n in range(8, 20)]
    assert both in ([W45, W46] * 6, [W46, W45] * 6)
    last = day(TUESDAY) + dt.timedelta(days=7) + GIVEN_UP_AFTER
    assert W45 in {due(store, last - dt.timedelta(days=n), 7).cycle for n in (0, 1)}
    assert {due(store, last + dt.timedelta(days=n), 7).cycle for n in (1, 2)} == {W46}


@pytest.mark.parametrize("action", ["refuse", "crown"])
def test_what_was_refused_or_crowned_is_not_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: Action
) -> None:
    store = Store(f"file://{tmp_path}")
    assert due(store, day(6), 7) == (W45, None)
    ledger_on(monkeypatch, day(TUESDAY))
    write(store, W45)
    assert due(store, day(8), 7).cycle == W45
    write(store, W45, action)
    assert due(store, day(8), 7).cycle == W46
