"""readout: what the stage refuses to read."""

from __future__ import annotations

from pathlib import Path

import pytest

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.release import expose, readout
from tests.release.test_stages import HALF, INGEST, Cycle, cycle
from tests.release.worlds import day, world, write

__all__ = ["cycle"]


def test_whole_days_of_utc_have_no_other_time_zone(cycle: Cycle, tmp_path: Path) -> None:
    """Midnight in London is yesterday in New York: every exposure of the store would come a day too early."""
    cycle.run(INGEST, ingest={"days": 8})
    cycle.run(expose.STAGE, expose={"experiments": [HALF | {"name": "of the store"}]})
    zone = {"time_zone": "America/New_York", "start": str(day(0)), "experiment": "of the store"}
    found_exposures, found_activity = write(tmp_path / "platform", *world(1, text=True), 2)
    for outside in ({}, {"exposures": [found_exposures]}, {"activity": [found_activity]}):
        with pytest.raises(InputError, match=r"name both readout.exposures and readout.activity"):
            cycle.run(readout.STAGE, readout=zone | outside)
    platform = {"exposures": [found_exposures], "activity": [found_activity], "experiment": "x"}
    assert cycle.run(readout.STAGE, readout=zone | platform).json("readout")["status"] == "closed"
