"""A stage as a Ray job: quoting, errors and clean-up against a real head on loopback, behind its token.

Slow and opt-in: it needs Ray's dashboard (`ray[default]`), and starts a cluster of its own.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import importlib.util
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
import yaml
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from launch_ray import OVER, Launcher, client, ended

from flywheel_tasks.core.stage import Resources, Stage
from flywheel_tasks.core.store import Store
from flywheel_tasks.pipeline import STAGES, by_name
from flywheel_tasks.simulation.traffic import write_event_log
from tests.conftest import USER_KEY

START_SECONDS = 240


def spanning(name: str) -> Stage:
    """A stage of the pipeline as if it spanned two nodes."""
    return Stage(**{**vars(by_name(name)), "resources": Resources(cpus=1, nodes=2)})


OPEN = next(stage.name for stage in STAGES if not stage.uses_user_key)
"""A stage that does not use the user key, so that it may run on a Ray cluster."""


@pytest.mark.parametrize(
    ("job", "code", "how"),
    [
        ({"status": "SUCCEEDED"}, 0, ""),
        ({"status": "FAILED", "driver_exit_code": 2, "message": "a\nb"}, 2, "failed on the Ray cluster: a b"),
        ({"status": "STOPPED", "driver_exit_code": None, "message": None}, None, "stopped on the Ray cluster: "),
    ],
)
def test_how_a_job_ended(job: dict[str, Any], code: int | None, how: str):
    assert (ended(job).code, ended(job).how) == (code, how)


def test_without_a_token_nothing_is_sent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    with pytest.raises(AirflowFailException, match="RAY_AUTH_TOKEN"):
        client("http://127.0.0.1:8265")


class Faulty:
    """A head whose answers get lost, as an httpx transport."""

    def __init__(self, lose_submit: bool, stops_that_fail: int) -> None:
        self.lose_submit, self.stops_that_fail = lose_submit, stops_that_fail
        self.running: set[str] = set()
        self.entry_points: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.method == "POST" and request.url.path == "/api/jobs/":
            job = json.loads(request.content)
            self.running.add(job["submission_id"])
            self.entry_points.append(job["entrypoint"])
            if self.lose_submit:
                raise httpx.ReadTimeout("lost", request=request)
            return httpx.Response(200, json={})
        if request.url.path.endswith("/stop"):
            self.stops_that_fail -= 1
            if self.stops_that_fail >= 0:
                return httpx.Response(500, text="the agent is away")
            self.running.clear()
            return httpx.Response(200, json={"stopped": True})
        if request.url.path.endswith("/logs"):
            return httpx.Response(200, json={"logs": ""})
        if request.url.path == "/api/jobs/":
            return httpx.Response(200, json=[])
        return httpx.Response(200, json={"status": "RUNNING" if self.running else "STOPPED"})


def launched_at(head: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launcher:
    file = tmp_path / "deployment.yaml"
    file.write_text("{deadline_hours: 2, ray: {poll_seconds: 0.01}}")
    monkeypatch.setenv("FLYWHEEL_DEPLOYMENT", str(file))
    transport = httpx.MockTransport(head)
    monkeypatch.setattr(
        "launch_ray.client", lambda address, timeout=30: httpx.Client(transport=transport, base_url=address)
    )
    return Launcher(task_id=OPEN, stage=spanning(OPEN), upstream=[])


def test_a_job_that_was_taken_unheard_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The head takes the job and its answer is lost: nobody would watch it run."""
    head = Faulty(lose_submit=True, stops_that_fail=0)
    launcher = launched_at(head, tmp_path, monkeypatch)
    with pytest.raises(httpx.ReadTimeout):
        type(launcher).execute.__wrapped__(launcher, context(tmp_path, "lost"))
    assert len(head.entry_points) == 1
    assert not head.running
    assert head.entry_points[0].startswith("timeout --kill-after=60 7800 flywheel run"), "it ends itself at the latest"


def test_a_cancelled_job_is_stopped_until_it_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    head = Faulty(lose_submit=False, stops_that_fail=3)
    launcher = launched_at(head, tmp_path, monkeypatch)

    def cancel() -> None:
        while not head.running:
            time.sleep(0.01)
        launcher.on_kill()

    threading.Thread(target=cancel, daemon=True).start()
    with pytest.raises(AirflowException, match="stopped on the Ray cluster"):
        type(launcher).execute.__wrapped__(launcher, context(tmp_path, "deaf"))
    assert head.stops_that_fail < 0


class Head:
    """A Ray head with its dashboard, on loopback, behind a token."""

    def __init__(self, folder: Path) -> None:
        self.token = secrets.token_hex(32)
        self.port, dashboard = free_port(), free_port()
        self.address = f"http://127.0.0.1:{dashboard}"
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        own["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        loopback = str(Path(__file__).with_name("loopback"))
        own["PYTHONPATH"] = os.pathsep.join(filter(None, (loopback, os.environ.get("PYTHONPATH"))))
        argv = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
        argv += ["--node-ip-address=127.0.0.1", f"--port={self.port}", "--num-cpus=2", f"--temp-dir={folder}"]
        argv += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
        argv += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
        argv += [f"--object-store-memory={100 << 20}"]
        with (folder / "head.log").open("wb") as log:
            self.process = subprocess.Popen(
                argv, env=os.environ | own, stdout=log, stderr=log, start_new_session=True, cwd=folder
            )
        deadline = time.monotonic() + START_SECONDS
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                pytest.skip(f"the Ray head did not come up: {(folder / 'head.log').read_text()[-300:]}")
            time.sleep(1)

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.address}/api/jobs/", headers=self.headers, timeout=10).status_code == 200
        except httpx.HTTPError:
            return False

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def jobs(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = httpx.get(f"{self.address}/api/jobs/", headers=self.headers, timeout=60).json()
        return found

    def family(self) -> list[psutil.Process]:
        """By session, because Ray's agents lose their parent; never by name, as other clusters may run here."""
        return [p for p in psutil.process_iter() if _session(p.pid) == self.process.pid]

    def stop(self) -> None:
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.process.wait()


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    if importlib.util.find_spec("aiohttp_cors") is None:
        pytest.skip("Ray's Jobs API is not installed: install ray[default]")
    running = Head(tmp_path_factory.mktemp("ray"))
    yield running
    running.stop()


@pytest.fixture
def deployed(head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Head:
    file = tmp_path / "deployment.yaml"
    environment = {"FLYWHEEL_PROFILE": "test", "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    file.write_text(yaml.safe_dump({"environment": environment, "ray": {"address": head.address, "poll_seconds": 0.5}}))
    monkeypatch.setenv("FLYWHEEL_DEPLOYMENT", str(file))
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
    return head


def context(tmp_path: Path, name: str, *overrides: str) -> dict[str, Any]:
    ti = SimpleNamespace(dag_id="d", run_id="r", task_id=f"{tmp_path.name}-{name}", xcom_pull=lambda task_ids: None)
    params = {"cycle": "2026-W47", "profile": "test", "overrides": [f"store.uri={tmp_path}/store", *overrides]}
    return {"params": params, "ti": ti}


def execute(stage: Stage, context: dict[str, Any]) -> str:
    launcher = Launcher(task_id=stage.name, stage=stage, upstream=[])
    return str(type(launcher).execute.__wrapped__(launcher, context))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_stage_runs_as_a_job_and_its_manifest_comes_back(deployed: Head, tmp_path: Path):
    logs, store = tmp_path / "logs", f"store.uri={tmp_path}/store"
    write_event_log(logs, users=8, days=2, seed=3, start=dt.date(2026, 11, 16))
    command = [sys.executable, "-m", "flywheel_tasks.cli", "run", "--cycle", "2026-W47", "--profile", "test"]
    here = os.environ | {"FLYWHEEL_USER_KEY": USER_KEY, "FLYWHEEL_HOME": str(tmp_path / "home")}
    for stage in STAGES[: [s.name for s in STAGES].index(OPEN)]:
        argv = [*command, stage.name, "--set", store, "--set", f"ingest.logs={logs}/*"]
        subprocess.run(argv, env=here, check=True, capture_output=True)
    uri = execute(spanning(OPEN), context(tmp_path, OPEN, f"ingest.logs={logs}/*"))
    assert Store(f"{tmp_path}/store").by_uri(uri).manifest.stage == OPEN
    assert [job["status"] for job in deployed.jobs()] == ["SUCCEEDED"]
    assert not any(USER_KEY in str(job) or deployed.token in str(job) for job in deployed.jobs())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_bad_input_is_final_and_hostile_settings_reach_no_shell(deployed: Head, tmp_path: Path):
    hostile = [f'{OPEN}.nothing="$(touch {tmp_path}/pwned)"', f"{OPEN}.nothing=;touch {tmp_path}/pwned"]
    given = context(tmp_path, "bad")
    with pytest.raises(AirflowFailException, match=r"bad input|nothing"):
        execute(spanning(OPEN), given | {"params": given["params"] | {"overrides": [*hostile]}})
    assert not (tmp_path / "pwned").exists()
    with pytest.raises(AirflowFailException, match="bad input"):
        execute(
            spanning(OPEN), context(tmp_path, "missing", f"{OPEN}={{}}", f"ingest.logs=['$(touch {tmp_path}/pwned)']")
        )
    assert not (tmp_path / "pwned").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_who_has_no_token_stays_out(deployed: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert httpx.get(f"{deployed.address}/api/jobs/", timeout=60).status_code == 401
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(AirflowFailException, match="refused"):
        execute(spanning(OPEN), context(tmp_path, "token"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cancelled_task_stops_its_job_and_a_new_try_the_one_before(deployed: Head, tmp_path: Path):
    given = context(tmp_path, "cancel")
    name = f"left-{tmp_path.name}"
    job = {
        "entrypoint": shlex.join(["sleep", "300"]),
        "submission_id": name,
        "metadata": {"task": f"d/r/{given['ti'].task_id}"},
    }
    httpx.post(f"{deployed.address}/api/jobs/", json=job, headers=deployed.headers, timeout=60).raise_for_status()
    launcher = Launcher(task_id=OPEN, stage=spanning(OPEN), upstream=[])

    def cancel() -> None:
        while not launcher._job:
            time.sleep(0.2)
        launcher.on_kill()

    threading.Thread(target=cancel, daemon=True).start()
    with pytest.raises(AirflowException):
        type(launcher).execute.__wrapped__(launcher, given)
    deadline = time.monotonic() + 60
    while any(job["status"] not in OVER for job in deployed.jobs()):
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_task_cancelled_before_it_has_its_job_sends_none(deployed: Head, tmp_path: Path):
    launcher = Launcher(task_id=OPEN, stage=spanning(OPEN), upstream=[])
    before = len(deployed.jobs())
    launcher.on_kill()
    with pytest.raises(AirflowException, match="cancelled"):
        type(launcher).execute.__wrapped__(launcher, context(tmp_path, "early"))
    assert len(deployed.jobs()) == before


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_that_outlives_its_deadline_is_ended_on_the_cluster(
    deployed: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A stage that hears no SIGTERM, and an Airflow that asks for nothing."""
    program = tmp_path / "bin" / "flywheel"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntrap '' TERM\necho $$ > {tmp_path}/pid\nwhile :; do sleep 0.2; done\n")
    program.chmod(0o755)
    file = Path(os.environ["FLYWHEEL_DEPLOYMENT"])
    settings = yaml.safe_load(file.read_text())
    settings["environment"]["PATH"] = f"{program.parent}:{os.environ['PATH']}"
    file.write_text(yaml.safe_dump(settings))
    monkeypatch.setattr("launch_ray.deadline", lambda hours: ["timeout", "--kill-after=1", "3"])
    with pytest.raises(AirflowException, match="failed on the Ray cluster"):
        execute(spanning(OPEN), context(tmp_path, "late"))
    pid, until = int((tmp_path / "pid").read_text()), time.monotonic() + 30
    while psutil.pid_exists(pid):
        assert time.monotonic() < until, "the stage runs on"
        time.sleep(0.2)


@pytest.mark.slow
def test_the_head_listens_on_loopback_alone(deployed: Head):
    listening: list[str] = []
    for process in deployed.family():
        with contextlib.suppress(psutil.NoSuchProcess):
            listening += [c.laddr.ip for c in process.net_connections("inet") if c.status == "LISTEN"]
    assert listening
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
