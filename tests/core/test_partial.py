"""What a killed attempt finished is found by the next one, and by nobody else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from flywheel_tasks.core.errors import FlywheelError, InputError
from flywheel_tasks.core.forget import forget
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.partial import Partial
from flywheel_tasks.core.runner import run_stage
from flywheel_tasks.core.stage import Inputs
from flywheel_tasks.core.storage import Storage
from flywheel_tasks.core.store import Store
from tests.drills.stages import CYCLE, FIRST, config_for

KEY = "0" * 32


@pytest.fixture
def partial(tmp_path: Path) -> Partial:
    return Partial(Storage(str(tmp_path)), "sft", KEY)


def test_pieces_come_back_and_a_damaged_one_is_absent(partial: Partial, tmp_path: Path) -> None:
    table = pa.table({"a": [1, 2]})
    partial.put("state", b"abc")
    partial.put_table("chunk-0", table)
    assert partial.get("state") == b"abc"
    assert partial.table("chunk-0", table.schema) == table
    assert partial.table("chunk-0", pa.schema([("b", pa.int64())])) is None
    assert partial.names() == ["chunk-0", "state"]
    stored = next(tmp_path.rglob("state"))
    stored.write_bytes(stored.read_bytes()[:-1] + b"x")
    assert partial.get("state") is None
    partial.clear()
    assert (partial.names(), partial.get("state")) == ([], None)


def test_a_name_cannot_leave_the_folder(partial: Partial) -> None:
    with pytest.raises(InputError, match=r"piece '\.\./x'"):
        partial.put("../x", b"")


def test_pieces_from_before_a_user_was_forgotten_are_not_found(tmp_path: Path) -> None:
    Partial(Storage(str(tmp_path)), "sft", KEY).put("chunk-0", b"words")
    later = Partial(Storage(str(tmp_path)), "sft", KEY, frozenset(["f00"]))
    assert later.get("chunk-0") is None
    later.clear()
    assert not list(tmp_path.rglob("chunk-0"))


def test_a_second_attempt_goes_on_and_the_commit_clears(tmp_path: Path) -> None:
    config = config_for(str(tmp_path / "store"))
    store, made = Store(config.store.uri), []

    def work(inputs: Inputs, config: object, out: Output) -> None:
        for name in ("a", "b"):
            if out.partial.get(name) is None:
                made.append(name)
                out.partial.put(name, name.encode())
            if len(made) == 1:
                raise RuntimeError("killed")
        out.json("report", out.partial.names())

    stage = replace(FIRST, run=work, outputs={"report": "json"})
    with pytest.raises(RuntimeError, match="killed"):
        run_stage(stage, CYCLE, config, store)
    made.append("-")
    result = run_stage(stage, CYCLE, config, store)
    assert (made, result.artifact.json("report")) == (["a", "-", "b"], ["a", "b"])
    assert not list(Path(store.storage.root).rglob("pieces"))


def test_forgetting_anybody_removes_all_partial_work(tmp_path: Path, user_key: bytes) -> None:
    store = Store(str(tmp_path))
    Partial(store.storage, "sft", KEY).put("chunk-0", b"words")
    forget(store, "ann", user_key)
    assert not list(tmp_path.rglob("chunk-0"))


def test_an_attempt_that_a_forgotten_user_overtook_keeps_nothing_more(tmp_path: Path, user_key: bytes) -> None:
    store = Store(str(tmp_path))
    under_way = Partial(store.storage, "sft", KEY, store.forgotten())
    under_way.put("chunk-0", b"words")
    forget(store, "ann", user_key)
    with pytest.raises(FlywheelError, match="a user was forgotten since this attempt began"):
        under_way.put("chunk-1", b"words")
    assert not list(tmp_path.rglob("chunk-*"))


def test_work_that_knew_of_the_user_survives_a_second_purge(tmp_path: Path, user_key: bytes) -> None:
    store = Store(str(tmp_path))
    forget(store, "ann", user_key)
    later = Partial(store.storage, "sft", KEY, store.forgotten())
    later.put("chunk-0", b"words of others")
    forget(store, "ann", user_key)
    assert later.get("chunk-0") == b"words of others"
    forget(store, "bob", user_key)
    assert later.get("chunk-0") is None
