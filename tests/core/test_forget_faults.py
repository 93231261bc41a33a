"""`forget` killed at every step: nobody reads half an artifact, and running it again finishes the purge."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flywheel_tasks.core import ids
from flywheel_tasks.core.forget import forget
from flywheel_tasks.core.store import Store
from tests.drills import worker
from tests.drills.fixtures import content

USER, SECRET = "a person", b"0123456789abcdef"


def test_killed_at_every_step_and_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pseudonym = ids.pseudonym(USER, SECRET)
    origin = tmp_path / "origin"
    for stage in ("first", "second"):
        worker.run(stage, str(origin), user=pseudonym)
    shutil.copytree(origin, tmp_path / "undisturbed")
    report = forget(Store(str(tmp_path / "undisturbed")), USER, SECRET)
    assert report["clean"]
    assert sum(report["purged"].values()) == 4
    expected = {a.manifest.stage: content(a) for a in Store(str(tmp_path / "undisturbed")).artifacts()}
    killed = 0
    while True:
        folder = tmp_path / f"killed-{killed}"
        shutil.copytree(origin, folder)
        code = worker.ended(worker.start(worker.forget_killed_at, killed + 1, str(folder), USER, SECRET))
        store = Store(str(folder))
        assert [a.verify() for a in store.artifacts()] == [7, 2], "every artifact is whole, purged or not"
        if code == 0:
            break
        assert code == -9
        again = forget(store, USER, SECRET)
        assert not again["remaining"]
        assert pseudonym in store.forgotten() or killed == 0
        after = {a.manifest.stage: content(a) for a in store.artifacts()}
        assert {s: sorted(c.values()) for s, c in after.items()} == {s: sorted(c.values()) for s, c in expected.items()}
        leftovers = [
            p.relative_to(folder)
            for p in folder.rglob("*.parquet")
            if pseudonym.encode() in p.read_bytes() and "activity" in p.parts
        ]
        assert not leftovers or not again["clean"], f"{killed}: {leftovers} hold the user, but the report says clean"
        killed += 1
    with capsys.disabled():
        print(f"\n  forget killed at each of its {killed} steps: every artifact whole, the re-run purged the rest")
    assert killed > 20
