"""Forgetting a user: nothing of theirs is left, everything else is, models are marked, and they can't come back."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from flywheel_tasks.core import ids, lease, lineage, schemas
from flywheel_tasks.core.config import FlywheelConfig
from flywheel_tasks.core.errors import ConfigError, FlywheelError, InputError
from flywheel_tasks.core.forget import forget
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.runner import run_stage
from flywheel_tasks.core.stage import Inputs
from flywheel_tasks.core.store import Store
from tests.drills.stages import CYCLE, FIRST, SECOND, config_for

USERS = ["ann", "bob", "cleo"]


def of(user: str, key: bytes) -> str:
    return ids.pseudonym(user, key)


@pytest.fixture
def store(tmp_path: Path, user_key: bytes) -> Store:
    """An artifact with rows and quarantine of three users, and a checkpoint trained below it."""

    def collect(inputs: Inputs, config: object, out: Output) -> None:
        import datetime

        rows = [
            {"unit_id": of(u, user_key), "day": datetime.date(2026, 11, 16), "sends": n} for u in USERS for n in (1, 2)
        ]
        with out.table("activity") as writer:
            writer.write(pa.Table.from_pylist(rows, schemas.ACTIVITY))
        bad = [
            {"row_id": "l:1", "reason": "odd", "where": "l:1", "user": of("ann", user_key), "raw": None},
            {"row_id": "l:2", "reason": "odd", "where": "l:2", "user": None, "raw": None},
            {"row_id": "l:3", "reason": "odd", "where": "l:3", "user": of("bob", user_key), "raw": None},
        ]
        out.reject(pa.Table.from_pylist(bad, schemas.QUARANTINE))
        out.account("row", rows_in=9, rows_out=6)

    def train(inputs: Inputs, config: object, out: Output) -> None:
        (out.folder("model") / "model.safetensors").write_bytes(b"weights")

    config: FlywheelConfig = config_for(str(tmp_path / "store"))
    config = config.model_copy(
        update={"tracking": config.tracking.model_copy(update={"uri": f"sqlite:///{tmp_path}/m.db"})}
    )
    store = Store(config.store.uri)
    run_stage(replace(FIRST, run=collect, outputs={"activity": "activity"}), CYCLE, config, store)
    run_stage(replace(SECOND, run=train, outputs={"model": "checkpoint"}), CYCLE, config, store)
    return store


def table(store: Store, stage: str, output: str) -> pa.Table:
    artifact = store.pointed(CYCLE, stage)
    assert artifact is not None
    return artifact.table(output).read()


def test_their_rows_go_and_the_others_stay(store: Store, user_key: bytes) -> None:
    report = forget(store, "ann", user_key)
    assert list(report["purged"].values()) == [3]
    assert (report["remaining"], report["clean"]) == ({}, True)
    left = table(store, "drill-first", "activity")
    assert set(left["unit_id"].to_pylist()) == {of("bob", user_key), of("cleo", user_key)}
    assert left.num_rows == 4
    assert table(store, "drill-first", "quarantine")["row_id"].to_pylist() == ["l:2", "l:3"]


def test_no_byte_of_them_is_left_in_the_store(store: Store, user_key: bytes) -> None:
    pseudonym = of("ann", user_key).encode()
    files = list(Path(store.storage.root).rglob("*.parquet"))
    assert any(pseudonym in _plain(p) for p in files)
    forget(store, "ann", user_key)
    assert not any(pseudonym in _plain(p) for p in Path(store.storage.root).rglob("*.parquet"))


def test_a_model_that_learned_from_them_must_retrain(store: Store, user_key: bytes) -> None:
    report = forget(store, "ann", user_key)
    model = store.pointed(CYCLE, "drill-second")
    assert model is not None
    assert report["retrain_needed"] == ["/".join(lineage.address(model.manifest))]
    assert model.manifest.forgotten[0].retrain_needed
    assert model.verify() == 1


def test_forgetting_twice_changes_nothing_and_a_stranger_touches_nothing(store: Store, user_key: bytes) -> None:
    forget(store, "ann", user_key)
    before = [a.manifest.to_bytes() for a in store.artifacts()]
    again = forget(store, "ann", user_key)
    assert again["purged"] == {}
    assert len(again["retrain_needed"]) == 1
    stranger = forget(store, "nobody", user_key)
    assert (stranger["purged"], stranger["known"], again["known"]) == ({}, False, True)
    assert [a.manifest.to_bytes() for a in store.artifacts()] == before


def test_an_attempt_that_may_hold_their_words_is_reported_until_it_is_old(store: Store, user_key: bytes) -> None:
    folder = Path(store.storage.root, "artifacts", "drill-first", "0" * 32, "20261116T000000-abc", "activity")
    folder.mkdir(parents=True)
    (folder / "rows-00000.parquet").write_bytes(b"half a file")
    report = forget(store, "ann", user_key)
    assert not report["clean"]
    assert len(report["unfinished_attempts"]) == 1
    os.utime(folder / "rows-00000.parquet", (0, 0))
    report = forget(store, "ann", user_key)
    assert report["clean"]
    assert len(report["abandoned_attempts_removed"]) == 1


def test_where_a_users_words_are(store: Store, user_key: bytes) -> None:
    artifact = store.pointed(CYCLE, "drill-first")
    assert artifact is not None
    assert lineage.held_rows(artifact, of("ann", user_key)) == {"activity": 2, "quarantine": 1}
    assert lineage.held_rows(artifact, of("nobody", user_key)) == {}


def _plain(path: Path) -> bytes:
    import pyarrow.parquet as pq

    return str(pq.read_table(path).to_pylist()).encode()


def test_an_empty_id_is_refused(store: Store, user_key: bytes) -> None:
    with pytest.raises(InputError, match="empty"):
        forget(store, " ", user_key)


def test_under_another_key_nothing_is_called_clean(tmp_path: Path, user_key: bytes) -> None:
    def nothing(inputs: Inputs, config: object, out: Output) -> None:
        out.json("report", {})

    config = config_for(str(tmp_path / "keyed"))
    store = Store(config.store.uri)
    run_stage(replace(FIRST, run=nothing, outputs={"report": "json"}, uses_user_key=True), CYCLE, config, store)
    assert forget(store, "ann", user_key)["clean"]
    with pytest.raises(ConfigError, match="another FLYWHEEL_USER_KEY"):
        forget(store, "ann", b"some other key of a new shell")


def test_two_purges_do_not_run_at_once(store: Store, user_key: bytes) -> None:
    with lease.held(store.storage, "forget.lock"), pytest.raises(FlywheelError, match="lock is held"):
        forget(store, "ann", user_key)
    assert forget(store, "ann", user_key)["clean"]
    assert store.storage.read("forget.lock") is None


def test_a_run_that_began_before_a_user_was_forgotten_cannot_bring_them_back(store: Store, user_key: bytes) -> None:
    def slow(inputs: Inputs, config: object, out: Output) -> None:
        forget(store, "bob", user_key)
        FIRST.run(inputs, config, out)

    config = config_for(store.uri)
    with pytest.raises(FlywheelError, match="a user was forgotten while it ran"):
        run_stage(replace(FIRST, run=slow), "2026-W48", config, store)
    assert store.pointed("2026-W48", "drill-first") is None


def test_what_a_file_system_leaves_in_the_store_stops_nobodys_purge(store: Store, user_key: bytes) -> None:
    """A Mac's .DS_Store beside an artifact, an NFS client's .nfs file among the signs of attempts."""
    artifact = store.pointed(CYCLE, "drill-first")
    assert artifact is not None
    root = Path(store.storage.root)
    (root / artifact.manifest.folder / ".DS_Store").write_bytes(b"x")
    (root / "attempts").mkdir(exist_ok=True)
    (root / "attempts" / ".nfs0001").write_bytes(b"x")
    report = forget(store, "ann", user_key)
    assert (list(report["purged"].values()), report["clean"]) == ([3], True)


def test_a_large_file_is_purged_a_batch_at_a_time(store: Store, user_key: bytes, tmp_path: Path) -> None:
    """What is left is what was there, in its order, over many batches."""
    import datetime

    day = datetime.date(2026, 11, 16)
    rows = [{"unit_id": of(USERS[n % 3], user_key), "day": day, "sends": n} for n in range(200_000)]

    def collect(inputs: Inputs, config: object, out: Output) -> None:
        with out.table("activity") as writer:
            writer.write(pa.Table.from_pylist(rows, schemas.ACTIVITY))
        out.account("row", rows_in=len(rows), rows_out=len(rows))

    config = config_for(store.uri)
    config = config.model_copy(
        update={"tracking": config.tracking.model_copy(update={"uri": f"sqlite:///{tmp_path}/m.db"})}
    )
    run_stage(replace(FIRST, run=collect, outputs={"activity": "activity"}, uses_cycle=True), "2026-W48", config, store)
    forget(store, "bob", user_key)
    artifact = store.pointed("2026-W48", "drill-first")
    assert artifact is not None
    assert artifact.table("activity").read()["sends"].to_pylist() == [n for n in range(200_000) if n % 3 != 1]
