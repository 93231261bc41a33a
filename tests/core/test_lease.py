"""A sign of life is renewed while its owner lives, keeps others out meanwhile, and is never taken from a living one."""

from __future__ import annotations

import datetime as dt
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from flywheel_tasks.core import lease
from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.core.lease import held
from flywheel_tasks.core.storage import Storage

PATH = "forget.lock"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def say(storage: Storage, **other: Any) -> None:
    """Change what the sign says."""
    storage.put(PATH, json.dumps(json.loads(storage.read(PATH) or b"") | other).encode())


def an_hour_ago() -> str:
    return (dt.datetime.now(dt.UTC) - dt.timedelta(minutes=61)).isoformat()


def test_a_living_owner_keeps_others_out_and_leaves_nothing(storage: Storage) -> None:
    with held(storage, PATH, why="x") as mine:
        mine.check()
        assert (lease.read(storage.read(PATH)) or {})["why"] == "x"
        with pytest.raises(FlywheelError, match=r"forget\.lock is held by a process on .* since 20.*: wait"):
            held(storage, PATH).__enter__()
        mine.check()
    assert storage.read(PATH) is None


def test_it_is_renewed_while_the_work_lasts(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_RENEW_SECONDS", 0.01)
    with held(storage, PATH) as mine:
        first, until = storage.read(PATH), time.monotonic() + 20
        while storage.read(PATH) == first and time.monotonic() < until:
            time.sleep(0.01)
        assert storage.read(PATH) != first
        mine.check()
    assert storage.read(PATH) is None


@pytest.mark.parametrize("dead", [{"pid": 2**22 + 1}, {"at": an_hour_ago(), "host": "elsewhere"}, {"at": "never"}])
def test_a_dead_ones_sign_is_taken_over_and_one_who_only_slept_learns_of_it(
    storage: Storage, dead: dict[str, Any]
) -> None:
    with held(storage, PATH) as slept:
        say(storage, **dead)
        with held(storage, PATH) as mine:
            with pytest.raises(FlywheelError, match="no longer this process's"):
                slept.check()
            slept.give_back()
            mine.check()


def test_a_process_of_another_container_with_this_ones_name_is_not_taken_for_dead(storage: Storage) -> None:
    with held(storage, PATH):
        say(storage, pid=2**22 + 1, processes="pid:[1]")
        assert lease.read(storage.read(PATH))


def test_two_who_find_a_dead_ones_sign_do_not_both_take_it(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(storage, PATH):
        say(storage, at=an_hour_ago())
        replace = storage.replace

        def beaten(path: str, old: bytes, new: bytes) -> bool:
            say(storage, pid=os.getppid())
            return replace(path, old, new)

        monkeypatch.setattr(storage, "replace", beaten)
        with pytest.raises(FlywheelError, match="held by another process"):
            held(storage, PATH).__enter__()
        assert json.loads(storage.read(PATH) or b"")["pid"] == os.getppid()


def test_the_reason_of_a_failure_is_not_hidden_by_a_store_that_is_gone(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(path: str) -> bytes:
        raise FlywheelError("the store is gone")

    def fail() -> None:
        with held(storage, PATH):
            monkeypatch.setattr(storage, "read", gone)
            raise RuntimeError("the reason")

    with pytest.raises(RuntimeError, match="the reason") as failed:
        fail()
    assert failed.value.__notes__ == ["and forget.lock could not be removed: the store is gone"]
