"""Receipts: found once under their name, and never a way out of the store."""

from __future__ import annotations

from pathlib import Path

import pytest

from flywheel_tasks.core import receipts
from flywheel_tasks.core.errors import InputError
from tests.release.promotion_world import RL, World


def test_a_receipt_leads_to_its_artifact_once(tmp_path: Path):
    world = World(tmp_path)
    made = world.run(RL)
    receipts.leave(world.store, "rl-0123", made)
    found = receipts.take(world.store, "rl-0123")
    assert found is not None
    assert found.uri == made.uri
    assert receipts.take(world.store, "rl-0123") is None
    assert receipts.take(world.store, "rl-4567") is None


@pytest.mark.parametrize("name", ["../cycles/x", "a/b", "", "..", "a\nb"])
def test_a_name_cannot_leave_its_folder(tmp_path: Path, name: str):
    world = World(tmp_path)
    with pytest.raises(InputError):
        receipts.leave(world.store, name, world.run(RL))


@pytest.mark.parametrize("text", ["file:///elsewhere/artifacts/rl/0/manifest.json", "s3://x/manifest.json", ""])
def test_a_receipt_that_points_elsewhere_is_refused(tmp_path: Path, text: str):
    world = World(tmp_path)
    world.store.storage.put("receipts/forged", text.encode())
    with pytest.raises(InputError, match="not a manifest of this store"):
        receipts.take(world.store, "forged")
