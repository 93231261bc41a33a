"""Forgetting while others work: an attempt that may hold the user's words is never passed over, and two purges of which
one was taken for dead leave every artifact whole."""

from __future__ import annotations

import datetime as dt
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from flywheel_tasks.core import forget as forgetting
from flywheel_tasks.core import ids, runner, schemas
from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.core.forget import forget
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.runner import Result, run_stage
from flywheel_tasks.core.stage import Inputs, Stage
from flywheel_tasks.core.storage import Storage
from flywheel_tasks.core.store import Store
from tests.drills import worker
from tests.drills.stages import CYCLE, FIRST, SECOND, config_for

USERS = ["ann", "bob", "cleo"]


class Door:
    """Where a thread waits until it is let on."""

    def __init__(self) -> None:
        self._here, self._open = threading.Event(), threading.Event()

    def stand(self) -> None:
        self._here.set()
        assert self._open.wait(60)

    def wait(self) -> None:
        assert self._here.wait(60)

    def open(self) -> None:
        self._open.set()


class Work:
    """A store, and stages that run in it, some of them beside the test."""

    def __init__(self, folder: Path, key: bytes, pool: ThreadPoolExecutor) -> None:
        self.config, self.key, self._pool = config_for(str(folder / "store")), key, pool
        self.store = Store(self.config.store.uri)

    def run(self, stage: Stage, seed: int = 17) -> Result:
        return run_stage(stage, CYCLE, self.config.model_copy(update={"seed": seed}), self.store)

    def begin(self, stage: Stage, seed: int = 17) -> Future[Result]:
        return self._pool.submit(self.run, stage, seed)

    def forget(self, user: str) -> dict[str, Any]:
        return forget(Store(self.store.uri), user, self.key)

    def begin_to_forget(self, user: str) -> Future[dict[str, Any]]:
        return self._pool.submit(self.forget, user)

    def users(self) -> set[str]:
        made = self.store.pointed(CYCLE, FIRST.name)
        assert made
        return set(made.table("activity").read()["unit_id"].to_pylist())

    def collect(self, meanwhile: Callable[[], object] = lambda: None) -> Stage:
        """A stage that writes a row of every user, of those who may be kept."""

        def write(inputs: Inputs, config: object, out: Output) -> None:
            units = sorted({ids.pseudonym(user, self.key) for user in USERS} - inputs.forgotten)
            rows = [{"unit_id": unit, "day": dt.date(2026, 11, 16), "sends": 1} for unit in units]
            with out.table("activity") as writer:
                writer.write(pa.Table.from_pylist(rows, schemas.ACTIVITY))
            (out.folder("layout") / "units.parquet").write_bytes(b"rows without names")
            meanwhile()
            out.account("row", rows_in=len(rows), rows_out=len(rows))

        return replace(FIRST, run=write, outputs={"activity": "activity", "layout": "derived"})

    def train(self, meanwhile: Callable[[], object] = lambda: None) -> Stage:
        def learn(inputs: Inputs, config: object, out: Output) -> None:
            assert inputs["activity"].read().num_rows
            meanwhile()
            (out.folder("model") / "model.safetensors").write_bytes(b"weights")

        return replace(SECOND, run=learn, outputs={"model": "checkpoint"})


@pytest.fixture
def work(tmp_path: Path, user_key: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    monkeypatch.setattr(runner, "Tracker", worker.NoTracker)
    with ThreadPoolExecutor(2) as pool:
        yield Work(tmp_path, user_key, pool)


def test_rows_without_names_go_with_the_named_ones_they_were_made_of(work: Work) -> None:
    work.run(work.collect())
    assert work.forget("nobody")["clean"]
    made = work.store.pointed(CYCLE, FIRST.name)
    assert made
    assert len(made.manifest.outputs["layout"].files) == 1
    assert work.forget("ann")["clean"]
    made = work.store.pointed(CYCLE, FIRST.name)
    assert made
    assert made.manifest.outputs["layout"].files == ()
    assert not list(Path(work.store.storage.root).rglob("units.parquet"))


def test_an_attempt_that_has_written_nothing_yet_is_reported_until_it_ends(work: Work) -> None:
    work.run(work.collect())
    door = Door()
    training = work.begin(work.train(door.stand))
    door.wait()
    report = work.forget("ann")
    assert (report["clean"], len(report["unfinished_attempts"])) == (False, 1)
    assert report["unfinished_attempts"][0].startswith("artifacts/drill-second/")
    door.open()
    with pytest.raises(FlywheelError, match="a user was forgotten while it ran"):
        training.result(60)
    assert work.forget("ann")["clean"]
    assert work.store.storage.list("attempts") == []


def test_an_attempt_that_knows_of_the_user_does_not_hold_up_the_proof(work: Work) -> None:
    work.run(work.collect())
    work.forget("ann")
    door = Door()
    collecting = work.begin(work.collect(door.stand), seed=18)
    door.wait()
    for folder in Path(work.store.storage.root).rglob("*.parquet"):
        os.utime(folder, (0, 0))  # it has been silent for long
    report = work.forget("ann")
    assert (report["clean"], report["unfinished_attempts"], report["abandoned_attempts_removed"]) == (True, [], [])
    door.open()
    made = collecting.result(60)
    assert made.outcome == "made"
    assert made.artifact.verify() == 2, "what it had written was left alone"
    assert work.users() == {ids.pseudonym(user, work.key) for user in ("bob", "cleo")}


def test_a_model_committed_in_the_middle_of_a_purge_is_no_part_of_a_clean_one(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks who was forgotten, nobody was; its commit comes when the models have been marked."""
    work.run(work.collect())
    door, checked, mark = Door(), runner._still_true, forgetting._mark_models

    def asked(*arguments: Any) -> None:
        checked(*arguments)
        door.stand()

    def marked(*arguments: Any) -> list[str]:
        found = mark(*arguments)
        door.open()
        training.result(60)
        return found

    monkeypatch.setattr(runner, "_still_true", asked)
    monkeypatch.setattr(forgetting, "_mark_models", marked)
    training = work.begin(work.train())
    door.wait()
    assert not work.forget("ann")["clean"]
    model = training.result(60).artifact.manifest
    assert model.forgotten == ()
    report = work.forget("ann")
    assert (report["clean"], report["retrain_needed"]) == (True, [f"{model.stage}/{model.key}"])


def test_the_sign_of_an_attempt_that_was_killed_is_removed(work: Work) -> None:
    receive, send = worker.SPAWN.Pipe(duplex=False)
    killed = worker.start(worker.killed_at, 20, send, "first", work.store.uri, {})
    assert worker.ended(killed) == -9
    receive.close()
    assert len(work.store.storage.list("attempts")) == 1
    assert work.forget("ann")["unfinished_attempts"], "its workers may still write"
    assert work.store.storage.list("attempts") == []
    for path in Path(work.store.storage.root, "artifacts").rglob("*"):
        os.utime(path, (0, 0))
    assert work.forget("ann")["clean"]


def test_a_commit_of_files_that_are_gone_is_refused(work: Work) -> None:
    def lose() -> None:
        for path in Path(work.store.storage.root, "artifacts").rglob("*.parquet"):
            path.unlink()

    with pytest.raises(FlywheelError, match="was removed after it was written: run drill-first again"):
        work.run(work.collect(lose))
    assert list(work.store.artifacts()) == []


def test_a_store_that_refuses_commits_refuses_before_the_work(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Storage, path: str, data: bytes) -> bool:
        raise FlywheelError("no credentials")

    monkeypatch.setattr(Storage, "put_new", refused)
    with pytest.raises(FlywheelError, match="no credentials"):
        work.run(work.collect(lambda: pytest.fail("it worked for nothing")))


@pytest.mark.parametrize(("other", "left"), [("bob", {"ann", "cleo"}), ("nobody", set(USERS))])
def test_a_purge_that_slept_through_another_one_destroys_nothing(
    work: Work, other: str, left: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sleeps for over an hour just before it replaces a manifest; the other takes it for dead, and purges somebody
    else or just removes the files that no manifest names, the sleeper's among them."""
    work.run(work.collect())
    door, swap = Door(), Storage.replace

    def slow(self: Storage, path: str, old: bytes, new: bytes) -> bool:
        if path.endswith("manifest.json") and b'"user": "' + ann in new:
            door.stand()
        return swap(self, path, old, new)

    ann = ids.pseudonym("ann", work.key).encode()
    monkeypatch.setattr(Storage, "replace", slow)
    sleeper = work.begin_to_forget("ann")
    door.wait()
    lock = json.loads(work.store.storage.read("forget.lock") or b"")
    late = dt.datetime.now(dt.UTC) - dt.timedelta(minutes=61)
    work.store.storage.put("forget.lock", json.dumps(lock | {"at": late.isoformat()}).encode())
    assert work.forget(other)["clean"]
    door.open()
    with pytest.raises(FlywheelError, match=r"by another forget meanwhile: run it again"):
        sleeper.result(60)
    assert work.users() == {ids.pseudonym(user, work.key) for user in left}
    assert [artifact.verify() for artifact in work.store.artifacts()] == [len(left) - 1]
    assert work.forget("ann")["clean"]
    assert work.users() == {ids.pseudonym(user, work.key) for user in left - {"ann"}}
