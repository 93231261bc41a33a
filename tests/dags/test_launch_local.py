"""A stage as a process: what it is given, what comes back, and that it never outlives its task."""

from __future__ import annotations

import datetime as dt
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from launch import LAUNCHERS, LONGEST_LINE, StageOperator, launcher_of
from launch_docker import Launcher as DockerLauncher
from launch_local import Launcher
from structlog.testing import capture_logs

from flywheel_tasks.core.config import StageConfig
from flywheel_tasks.core.stage import Resources, Stage

URI = "file:///store/artifacts/filter/0123/manifest.json"


def stage(**changes: Any) -> Stage:
    fields = {
        "name": "filter",
        "phase": "curation",
        "paper": "Sec. 2.2",
        "run": print,
        "config": StageConfig,
        "outputs": {},
    }
    return Stage(**(fields | changes))


def launcher(script: str, **changes: Any) -> Launcher:
    operator = Launcher(task_id="filter", stage=stage(**changes), upstream=["ingest"])
    operator.command = (sys.executable, "-c", script)
    return operator


class Upstream:
    """The one thing the operator asks of Airflow's task instance."""

    def xcom_pull(self, task_ids: str) -> str | None:
        return {"ingest": "file:///store/artifacts/ingest/abc/manifest.json"}.get(task_ids)


def execute(operator: Launcher, **params: Any) -> str:
    context = {"params": {"cycle": "2026-W47", "profile": "demo", **params}, "ti": Upstream()}
    return str(type(operator).execute.__wrapped__(operator, context))


def wait_for(condition: Any, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_hostile_settings_arrive_as_text(tmp_path: Path):
    hostile = [
        f"a=; touch {tmp_path}/pwned",
        f"a=$(touch {tmp_path}/pwned)",
        "a=`id`\n--input=x",
        "a={{ ti.task }}",
        "a=' \" \\ *",
    ]
    report = tmp_path / "argv.json"
    script = f"import sys, json; json.dump(sys.argv[1:], open({str(report)!r}, 'w')); print('noise'); print({URI!r})"
    assert execute(launcher(script), overrides=hostile) == URI
    expected = ["run", "filter", "--cycle", "2026-W47", "--profile", "demo"]
    for text in hostile:
        expected += ["--set", text]
    assert json.loads(report.read_text()) == [
        *expected,
        "--input",
        "ingest=file:///store/artifacts/ingest/abc/manifest.json",
    ]
    assert list(tmp_path.iterdir()) == [report]


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("raise SystemExit(2)", AirflowFailException, "bad input"),
        ("raise SystemExit(1)", AirflowException, "exit code 1"),
        ("import os; os.kill(os.getpid(), 9)", AirflowException, "killed by SIGKILL"),
        ("print('done')", AirflowFailException, "without printing its manifest"),
        ("pass", AirflowFailException, "without printing its manifest"),
        (f"print({URI!r} + ' and more')", AirflowFailException, "without printing its manifest"),
    ],
)
def test_failures(script: str, error: type[Exception], message: str):
    with pytest.raises(error, match=message) as caught:
        execute(launcher(script))
    assert type(caught.value) is error, "only a failure that another try may mend is tried again"


@pytest.mark.parametrize("after", ["import os; os.kill(os.getpid(), 11)", "print('a child that says something')"])
def test_the_manifest_decides_not_the_exit_code_and_not_the_last_word(after: str):
    """The work was committed, then the interpreter fell over on its way out."""
    assert execute(launcher(f"print({URI!r}, flush=True); {after}")) == URI


@pytest.mark.parametrize("uses", [True, False])
def test_secrets_reach_only_who_needs_them(uses: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FLYWHEEL_USER_KEY", "k" * 32)
    monkeypatch.setenv("AIRFLOW__API_AUTH__JWT_SECRET", "jwt")
    monkeypatch.setenv("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", "postgresql://u:p@h/d")
    seen = tmp_path / "env.json"
    script = f"import os, json; json.dump(dict(os.environ), open({str(seen)!r}, 'w')); print({URI!r})"
    execute(launcher(script, uses_user_key=uses))
    environment = json.loads(seen.read_text())
    assert not [name for name in environment if name.startswith("AIRFLOW__")]
    assert ("FLYWHEEL_USER_KEY" in environment) is uses


def test_the_log_is_the_stages_stderr_line_by_line():
    script = (
        "import sys; e = sys.stderr.buffer\n"
        f"e.write(b'one\\ntwo \\x1b[2J\\xff\\n' + b'x' * {LONGEST_LINE + 50} + b'\\nlast without newline')\n"
        f"print({URI!r})"
    )
    operator = launcher(script)
    with capture_logs() as said:
        execute(operator)
    long = "x" * LONGEST_LINE + " … 50 characters more"
    assert [entry["event"] for entry in said] == ["one", "two �[2J�", long, "last without newline", f"artifact: {URI}"]


def test_a_child_left_behind_does_not_hold_the_task_up(tmp_path: Path):
    pid = tmp_path / "pid"
    script = "import subprocess, sys\n"
    script += "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(30)'], start_new_session=True)\n"
    script += f"open({str(pid)!r}, 'w').write(str(p.pid)); print({URI!r})"
    began = time.monotonic()
    assert execute(launcher(script)) == URI
    assert time.monotonic() - began < 25
    os.kill(int(pid.read_text()), signal.SIGKILL)


FAMILY = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", deaf])
open({pids!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
time.sleep(60)
"""


def test_a_cancelled_task_takes_its_whole_process_group_along(tmp_path: Path):
    pids = tmp_path / "pids"
    operator = launcher(FAMILY.format(pids=str(pids)))

    def cancel() -> None:
        wait_for(lambda: pids.exists() and pids.read_text())
        operator.on_kill()

    threading.Thread(target=cancel, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(AirflowException, match="killed by SIGKILL"):
        execute(operator)
    assert time.monotonic() - began < 30
    wait_for(lambda: not any(alive(int(pid)) for pid in pids.read_text().split()))


def test_a_stage_ends_when_its_worker_is_killed(tmp_path: Path):
    pid = tmp_path / "pid"
    stage_script = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    worker = "import os, sys\nfrom flywheel_tasks import processes\n"
    worker += f"argv = [sys.executable, '-c', {stage_script!r}]\n"
    worker += "processes.spawn(argv, env=os.environ, stdout=None, stderr=None).wait()"
    parent = subprocess.Popen([sys.executable, "-c", worker])
    wait_for(lambda: pid.exists() and pid.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not alive(int(pid.read_text())))


@pytest.mark.parametrize("launcher", [Launcher, DockerLauncher], ids=["local", "docker"])
def test_a_stage_takes_as_many_slots_as_cores_but_never_more_than_there_are(launcher: type[StageOperator]):
    cores = os.cpu_count() or 1
    assert launcher.placement(stage(resources=Resources(cpus=0.5)))["pool_slots"] == 1
    assert launcher.placement(stage(resources=Resources(cpus=10_000)))["pool_slots"] == cores
    assert launcher.placement(stage(resources=Resources(gpus=1)))["pool_slots"] == cores, (
        "one machine, its GPUs undivided"
    )


@pytest.mark.parametrize("mode", LAUNCHERS)
def test_every_launcher_stops_a_stage_at_its_deadline(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "deployment.yaml").write_text("deadline_hours: 3")
    monkeypatch.setenv("FLYWHEEL_DEPLOYMENT", str(tmp_path / "deployment.yaml"))
    assert launcher_of(mode).placement(stage())["execution_timeout"] == dt.timedelta(hours=3)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
