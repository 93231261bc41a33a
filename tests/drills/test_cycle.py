"""A whole cycle under what a bad week brings: killed processes, two schedulers, a clock that jumps, a store that can't
be written, an audit of every unpickling."""

from __future__ import annotations

import datetime as dt
import os
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from flywheel_tasks.core import ids, runner
from flywheel_tasks.core.store import Store
from tests.drills import kill_cycle, kill_loop, small_cycle, watched
from tests.drills.killing import Count
from tests.drills.lived import Lived

SEEDS = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], float]:
    folder = tmp_path_factory.mktemp("cycle")
    kill_cycle.traffic(folder)
    return (folder, *kill_cycle.reference(folder, kill_cycle.QUICK, ()))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_processes_leave_nothing_but_the_same_artifacts(
    world: tuple[Path, dict[str, Any], float], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, wanted, took = world
    count = Count()
    for seed in range(SEEDS):
        kill_cycle.drill(seed, folder, kill_cycle.QUICK, (), took, wanted, count)
    with capsys.disabled():
        print(f"\n  {count.kills} processes of {SEEDS} cycles killed, each cycle resumed to the same keys and digests")
    assert count.resumed == SEEDS
    assert count.kills > SEEDS


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_killed_stage_of_a_whole_week_is_resumed_to_the_same_artifact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        print()
        assert kill_loop.main(tmp_path, seeds=2) == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_schedulers_at_once_make_one_cycle(
    world: tuple[Path, dict[str, Any], float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, wanted, _ = world
    both = [small_cycle.start(tmp_path, kill_cycle.logs(folder), kill_cycle.QUICK) for _ in range(2)]
    said = ""
    for process in both:
        _, err = process.communicate(timeout=900)
        assert process.returncode == 0, err[-2000:]
        said += err
    ends = {end: said.count(f": {end} artifacts/") for end in ("made", "another attempt was first:", "already there:")}
    with capsys.disabled():
        print(f"\n  two schedulers, {len(kill_cycle.QUICK)} stages each: {ends}")
    assert ends["made"] == len(kill_cycle.QUICK), "every artifact was made once"
    assert sum(ends.values()) == 2 * len(kill_cycle.QUICK)
    store = Store(str(tmp_path / "store"))
    assert small_cycle.contents(store, kill_cycle.QUICK) == wanted
    manifests = [path.parent for path in (tmp_path / "store" / "artifacts").glob("*/*/manifest.json")]
    assert len(manifests) == len(kill_cycle.QUICK)
    for made in manifests:  # of the attempt that lost nothing is left
        assert len([attempt for attempt in made.iterdir() if attempt.is_dir() and any(attempt.rglob("*.*"))]) == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_store_that_turns_read_only_is_one_clear_line_and_nothing_is_lost(
    world: tuple[Path, dict[str, Any], float], tmp_path: Path
) -> None:
    folder, wanted, _ = world
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system of its own can only be mounted by root")
    try:
        small_cycle.finished(small_cycle.start(disk, kill_cycle.logs(folder), small_cycle.STAGES[:2]))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        # Tracking lies on the same disk; what is under test is the store.
        elsewhere = (f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}",)
        refused = small_cycle.start(
            disk, kill_cycle.logs(folder), ("expose",), elsewhere, FLYWHEEL_HOME=str(tmp_path / "home")
        )
        _, said = refused.communicate(timeout=300)
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert refused.returncode == 1, said
        assert len(errors) == 1, said
        assert "Read-only" in errors[0] or "read-only" in errors[0], said
        assert "Traceback" not in said
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        small_cycle.finished(small_cycle.start(disk, kill_cycle.logs(folder), kill_cycle.QUICK))
        assert small_cycle.contents(Store(str(disk / "store")), kill_cycle.QUICK) == wanted
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("days", [400.0, -400.0])
def test_a_clock_that_jumps_changes_no_artifact(
    tmp_path: Path, user_key: bytes, monkeypatch: pytest.MonkeyPatch, days: float
) -> None:
    kill_cycle.traffic(tmp_path)
    logs = kill_cycle.logs(tmp_path)
    wanted = small_cycle.run_all(tmp_path / "steady", logs)
    small_cycle.run_all(tmp_path / "jumping", logs, stages=small_cycle.STAGES[:2])
    with monkeypatch.context() as patched:
        _shift(patched, days)
        small_cycle.run_all(tmp_path / "jumping", logs, stages=small_cycle.STAGES[:4])
    small_cycle.run_all(tmp_path / "jumping", logs)
    first, second = (Store(str(tmp_path / name / "store")) for name in ("steady", "jumping"))
    assert small_cycle.contents(second, small_cycle.STAGES) == small_cycle.contents(first, small_cycle.STAGES)
    assert set(wanted) == set(small_cycle.STAGES)
    made = second.pointed(small_cycle.CYCLE, "diversify")
    assert made
    assert abs((made.manifest.finished - dt.datetime.now(dt.UTC)).days) > 300  # it did jump


def _shift(patched: pytest.MonkeyPatch, days: float) -> None:
    """The clock as the runner, the attempts' names and `time` tell it."""
    offset, real = dt.timedelta(days=days), time.time

    class Shifted(dt.datetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> dt.datetime:  # type: ignore[override]
            return dt.datetime.now(tz) + offset

    fake = types.SimpleNamespace(**{name: getattr(dt, name) for name in ("UTC", "date", "timedelta", "time")})
    fake.datetime = Shifted
    for module in (runner, ids):
        patched.setattr(module, "datetime", fake)
    patched.setattr(time, "time", lambda: real() + offset.total_seconds())


def test_the_audit_sees_an_unpickling_and_tells_whose_it_is(tmp_path: Path) -> None:
    """The hook itself: without this, silence would prove nothing."""
    guilty = tmp_path / "guilty.py"
    guilty.write_text("import pickle, collections\npickle.loads(pickle.dumps(collections.OrderedDict(a=1)))\n")
    subprocess.run([sys.executable, str(guilty)], env=os.environ | watched.audited(tmp_path), check=True)
    assert watched.unpickled(tmp_path) == [f"{guilty}\tcollections.OrderedDict"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_product_code_unpickles_during_a_cycle(lived: Lived, capsys: pytest.CaptureFixture[str]) -> None:
    calls = watched.unpickled(lived.folder)
    with capsys.disabled():
        print(f"\n  {len(calls):,} classes unpickled by libraries, {len(watched.ours(calls))} by product code")
    assert calls, "Ray's own processes were under the audit too"
    assert watched.ours(calls) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_listens_beyond_this_machine_during_a_cycle(lived: Lived, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n  listened on during a cycle: {', '.join(sorted(lived.listening))}")
    assert lived.listening, "Ray was seen"
    assert lived.listening <= {"127.0.0.1", "::1"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_without_asserts_a_cycle_is_the_same_and_does_not_unpickle(
    world: tuple[Path, dict[str, Any], float], tmp_path: Path
) -> None:
    folder, wanted, _ = world
    listening = watched.run(tmp_path, kill_cycle.logs(folder), kill_cycle.QUICK, PYTHONOPTIMIZE="1")
    assert small_cycle.contents(Store(str(tmp_path / "store")), kill_cycle.QUICK) == wanted
    assert watched.ours(watched.unpickled(tmp_path)) == []
    assert listening <= {"127.0.0.1", "::1"}
