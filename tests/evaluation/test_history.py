"""history: what the store knows of a version."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from flywheel_tasks.core.tracking import Tracker
from flywheel_tasks.evaluation.figures import growth
from flywheel_tasks.evaluation.history import of_cycle
from flywheel_tasks.release import champion
from tests.release.promotion_world import World


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
    assert growth(versions, "breadth") == ([0], [pytest.approx(1.015)])
