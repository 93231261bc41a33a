"""Which release a day's reading is about (Sec. 2.5.2): a candidate is nominated in mid-week, so its window ends in the
next one, and what people did in it is ingested later still."""

from __future__ import annotations

from datetime import date, timedelta
from typing import NamedTuple

from flywheel_tasks.core import ids
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.release import ledger

GIVEN_UP_AFTER = timedelta(days=28)
"""A release whose window could not be closed by then waits for a person."""


class Due(NamedTuple):
    cycle: str
    ingest: Artifact | None
    """The newest of the store: its activity reaches furthest."""


def due(store: Store, settled: date, days: int) -> Due:
    """The release whose window of `days` days is not closed yet; days take turns where several are open, so that one
    which never closes holds up no other. Where none is, that of the week of the last settled day."""
    state = ledger.read(store.storage)
    cycles = sorted({entry.cycle for entry in state.entries})
    still = [cycle for cycle in cycles if is_open(store, state, cycle, settled, days)]
    cycle = still[settled.toordinal() % len(still)] if still else ids.cycle_of(settled)
    known = (store.pointed(cycle, "ingest") for cycle in reversed(store.cycles()))
    return Due(cycle, next((found for found in known if found), None))


def is_open(store: Store, state: ledger.State, cycle: str, settled: date, days: int) -> bool:
    """Whether the cycle has a candidate that people meet and no closed readout of it."""
    nomination = state.nomination(cycle)
    if nomination is None or nomination.model is None or state.released(cycle):
        return False
    began = nomination.at.date()
    if not began <= settled <= began + timedelta(days=days) + GIVEN_UP_AFTER:
        return False
    read = store.pointed(cycle, "readout")
    said = read.json("readout") if read else {}
    tested = (said.get("candidate") or {}).get("sha256")
    return not (said.get("status") == "closed" and tested == nomination.model.sha256)
