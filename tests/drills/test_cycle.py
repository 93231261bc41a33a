"""A whole cycle under what a bad week brings: killed processes, two schedulers, a clock that jumps, a store that can't
be written, tracking that is down; and under watch, for what it unpickles and where it listens."""

from __future__ import annotations

import datetime as dt
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flywheel_tasks.core.store import Store
from tests.drills import kill_cycle, kill_loop, small_cycle, watched
from tests.drills.hooking import hooked
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
    """They meet at the commit of every stage: each has made the whole artifact, and one of the two is published."""
    folder, wanted, _ = world
    meeting = hooked(tmp_path, "meeting", DRILL_MEETING=str(tmp_path / "meeting"))
    both = [small_cycle.start(tmp_path, kill_cycle.logs(folder), kill_cycle.QUICK, **meeting) for _ in range(2)]
    said = ""
    for process in both:
        _, err = process.communicate(timeout=900)
        assert process.returncode == 0, err[-2000:]
        said += err
    ends = {end: said.count(f": {end} artifacts/") for end in ("made", "another attempt was first:", "already there:")}
    with capsys.disabled():
        print(f"\n  two schedulers met at the commits of {len(kill_cycle.QUICK)} stages: {ends}")
    met = {stage.name: len(list(stage.iterdir())) for stage in (tmp_path / "meeting").iterdir()}
    assert met == dict.fromkeys(kill_cycle.QUICK, 2), "two processes stood at every commit"
    assert list(ends.values()) == [len(kill_cycle.QUICK), len(kill_cycle.QUICK), 0]
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


@pytest.fixture(scope="module")
def steady(world: tuple[Path, dict[str, Any], float], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All stages under the true clock."""
    home = tmp_path_factory.mktemp("steady")
    small_cycle.finished(small_cycle.start(home, kill_cycle.logs(world[0])))
    return small_cycle.contents(Store(str(home / "store")), small_cycle.STAGES)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("days", [400, -400])
def test_a_clock_that_jumps_changes_no_artifact(
    world: tuple[Path, dict[str, Any], float],
    steady: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    days: int,
) -> None:
    """Every process of every stage lives in another year than the logs and the machine."""
    clock = hooked(tmp_path, "clock", DRILL_CLOCK_DAYS=str(days))
    small_cycle.finished(small_cycle.start(tmp_path, kill_cycle.logs(world[0]), **clock))
    store = Store(str(tmp_path / "store"))
    found = small_cycle.contents(store, small_cycle.STAGES)
    different = [stage for stage in small_cycle.STAGES if found[stage] != steady[stage]]
    finished = [store.get(stage, key).manifest.finished for stage, (key, _) in found.items()]
    off = [(at - dt.datetime.now(dt.UTC)).days for at in finished]
    files = sum(len(digests) for _, digests in found.values())
    with capsys.disabled():
        print(f"\n  {len(off)} stages {min(off)} to {max(off)} days off: {files} files, {len(different)} stages differ")
    assert different == []
    assert all(abs(one - days) < 3 for one in off), "every stage did live in that year"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_clock_drill_notices_a_stage_that_writes_the_date(
    world: tuple[Path, dict[str, Any], float], tmp_path: Path
) -> None:
    made = []
    for days in ("0", "400"):
        home = tmp_path / days
        hooks = hooked(home, "clock", "dated", DRILL_CLOCK_DAYS=days)
        small_cycle.finished(small_cycle.start(home, kill_cycle.logs(world[0]), kill_cycle.QUICK[:2], **hooks))
        made.append(small_cycle.contents(Store(str(home / "store")), kill_cycle.QUICK[:2]))
    assert made[0]["ingest"] == made[1]["ingest"], "ingest writes no JSON"
    assert made[0]["filter"][0] == made[1]["filter"][0]
    assert made[0]["filter"] != made[1]["filter"], "its report says on which day it was made"


def test_every_clock_that_a_stage_can_read_jumps(tmp_path: Path) -> None:
    readings = (
        "import datetime as dt, time, pandas; now = dt.datetime.now(dt.UTC); today = dt.date.today()\n"
        "print(now.year, dt.datetime.now().year, dt.datetime.utcnow().year, today.year, dt.datetime.today().year,"
        "dt.datetime.fromtimestamp(time.time()).year, dt.datetime.fromtimestamp(time.time_ns() / 1e9).year,"
        "time.gmtime().tm_year, time.localtime().tm_year, time.ctime()[-4:], time.asctime()[-4:], time.strftime('%Y'),"
        "pandas.Timestamp.now().year, pandas.to_datetime('now').year)\n"
        "assert isinstance(now, dt.datetime) and isinstance(today, dt.date) and dt.datetime(2026, 1, 2).day == 2"
    )
    environment = os.environ | hooked(tmp_path, "clock", DRILL_CLOCK_DAYS=str(20 * 365))
    done = subprocess.run([sys.executable, "-c", readings], env=environment, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {str((dt.datetime.now(dt.UTC) + dt.timedelta(days=20 * 365)).year)}


@pytest.fixture(params=["refuses", "never answers"])
def mlflow_down(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a server that refuses connections, and of one that takes them and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param == "never answers":
            server.listen(64)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_mlflow_down_costs_a_stage_a_warning_and_the_next_run_makes_up_for_it(
    world: tuple[Path, dict[str, Any], float],
    tmp_path: Path,
    mlflow_down: str,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, wanted, _ = world
    began = time.monotonic()
    down = small_cycle.start(tmp_path, kill_cycle.logs(folder), ("ingest",), (f"tracking.uri={mlflow_down}",))
    _, said = down.communicate(timeout=600)
    took = time.monotonic() - began
    assert down.returncode == 0, said[-2000:]
    assert "Traceback" not in said
    store = Store(str(tmp_path / "store"))
    assert small_cycle.contents(store, ("ingest",))["ingest"] == wanted["ingest"]
    waiting = tmp_path / "store" / "tracking" / "pending"
    kept = [json.loads(path.read_text()) for path in waiting.iterdir()]
    assert [(record["stage"], record["status"]) for record in kept] == [("ingest", "FINISHED")]
    small_cycle.finished(small_cycle.start(tmp_path, kill_cycle.logs(folder), ("filter",)))
    late = [path.name for path in waiting.iterdir()]
    with capsys.disabled():
        print(
            f"\n  MLflow {request.node.callspec.params['mlflow_down']}: ingest made the same artifact in {took:.0f} s, "
            f"{said.count('warning: ')} warnings, {len(kept)} record kept, {len(late)} left after the next run"
        )
    assert took < 180, "a server that says nothing holds a stage up for a bounded time"
    assert said.count("warning: ") >= 2
    assert late == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_product_code_unpickles_during_a_cycle(lived: Lived, capsys: pytest.CaptureFixture[str]) -> None:
    calls = watched.unpickled(lived.folder)
    with capsys.disabled():
        print(f"\n  {watched.summary(calls)}")
    assert any(watched.entrance(call) for call in calls), "Ray's own processes were under the audit too"
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
