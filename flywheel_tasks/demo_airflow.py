"""The few calls of Airflow's REST API that the demo needs, and a run followed to its end."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.core.manifest import Manifest
from flywheel_tasks.core.store import Store
from flywheel_tasks.pipeline import STAGES
from flywheel_tasks.services import Endpoints, state_dir

LOG_LINES = 25
DONE = ("success", "failed", "skipped", "upstream_failed", "removed")
ASKS = "approve"
"""The task that waits for a person where the gate holds."""
ANSWERABLE_AFTER_SECONDS = 12
"""Airflow 3.3 fails a task that is answered in the first seconds of its wait."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """The last state of one task of a run, and its artifact where it has one."""

    stage: str
    state: str
    seconds: float
    tries: int
    manifest: Manifest | None = None


@dataclass(frozen=True)
class Run:
    """A run of a DAG that has ended."""

    started: datetime.datetime
    tasks: list[Task]
    state: str


class Airflow:
    """Airflow as a person with its password uses it; `check` raises when a service has died."""

    def __init__(self, endpoints: Endpoints, check: Callable[[], None], say: Say) -> None:
        login = {"username": endpoints.user, "password": endpoints.password()}
        answer = httpx.post(
            f"{endpoints.airflow}/auth/token", json=login, timeout=60, trust_env=False
        ).raise_for_status()
        bearer = {"Authorization": f"Bearer {answer.json()['access_token']}"}
        self._http = httpx.Client(base_url=f"{endpoints.airflow}/api/v2", headers=bearer, timeout=60, trust_env=False)
        self._manifests: dict[tuple[str, str], Manifest] = {}
        self.check, self.say = check, say

    def get(self, path: str) -> Any:
        try:
            return self._json(self._http.get(path))
        except httpx.TransportError as error:
            raise FlywheelError(f"Airflow does not answer ({error}): see its logs in {state_dir() / 'logs'}") from error

    def wait_for_dag(self, dag: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while self._http.get(f"/dags/{dag}/details").status_code != 200:
            self.check()
            for error in self.get("/importErrors")["import_errors"]:
                problem = FlywheelError(f"Airflow cannot read {error['filename']}")
                problem.add_note(error["stack_trace"])
                raise problem
            if time.monotonic() > deadline:
                raise FlywheelError(
                    f"Airflow has not found the DAG '{dag}' after {seconds:.0f} s: see the dag-processor's log"
                )
            time.sleep(0.5)

    def pause(self, dag: str, paused: bool) -> bool:
        """Set whether the schedule runs; returns what it was."""
        before = self.get(f"/dags/{dag}")["is_paused"]
        self._json(self._http.patch(f"/dags/{dag}", json={"is_paused": paused}))
        return bool(before)

    def succeeded(self, dag: str, conf: dict[str, Any]) -> bool:
        """Whether a run of the DAG that was given just this has succeeded."""
        runs = self.get(f"/dags/{dag}/dagRuns?state=success&order_by=-id&limit=100")["dag_runs"]
        return any({key: run["conf"].get(key) for key in conf} == conf for run in runs)

    def run(self, dag: str, conf: dict[str, Any], hold: Callable[[], tuple[str, str]] | None = None) -> Run:
        """Trigger the DAG and print each change of a task until the run ends; of a failure, the end of its log. Where a
        task waits for a person, `hold` says what to answer and why."""
        run_id = f"demo-{conf['cycle']}-{datetime.datetime.now():%Y%m%dT%H%M%S}"
        body = {"dag_run_id": run_id, "logical_date": None, "conf": conf}
        run_id = str(self._json(self._http.post(f"/dags/{dag}/dagRuns", json=body))["dag_run_id"])
        self.say(f"\nCycle {conf['cycle']}: {dag}, run {run_id}")
        path, last, answered = f"/dags/{dag}/dagRuns/{run_id}", dict[str, tuple[str, int]](), 0
        while True:
            self.check()
            state = self.get(path)["state"]
            tasks = self._tasks(path)
            for task in tasks:
                now = (task.state, task.tries)
                quiet = task.state in ("none", "scheduled", "queued", "skipped") or task.stage in conf.get("skip", ())
                if quiet or last.get(task.stage) == now:
                    continue
                last[task.stage] = now
                clock = datetime.datetime.now()
                self.say(f"  {clock:%H:%M:%S}  {task.stage:<22} {task.state:<14} {describe(task)}".rstrip())
                if task.state in ("failed", "up_for_retry"):
                    self.say(self._log_tail(path, task))
            if state in ("success", "failed"):
                started = datetime.datetime.fromisoformat(self.get(path)["start_date"])
                return Run(started, tasks, state)
            asks = next((task for task in tasks if task.stage == ASKS and task.state == "awaiting_input"), None)
            if hold and asks and asks.tries != answered:
                time.sleep(ANSWERABLE_AFTER_SECONDS)
                self._answer(path, *hold())
                answered = asks.tries
            time.sleep(1)

    def _answer(self, path: str, option: str, why: str) -> None:
        """What a person does in the form of the waiting task."""
        given = {"chosen_options": [option], "params_input": {"why": why}}
        self._json(self._http.patch(f"{path}/taskInstances/{ASKS}/-1/hitlDetails", json=given))
        self.say(f"  the gate held; answered over Airflow's API, as a person would in its form: {option} ({why})")

    def _tasks(self, path: str) -> list[Task]:
        rows = self.get(f"{path}/taskInstances")["task_instances"]
        order = {stage.name: place for place, stage in enumerate(STAGES)}
        return [
            Task(
                stage=row["task_id"],
                state=row["state"] or "none",
                seconds=row["duration"] or 0.0,
                tries=row["try_number"],
                manifest=self._manifest(path, row["task_id"]) if row["state"] == "success" else None,
            )
            for row in sorted(rows, key=lambda row: order.get(row["task_id"], len(order)))
        ]

    def _log_tail(self, path: str, task: Task) -> str:
        """The end of the task's log without what Airflow says before and after the stage."""
        said, folded = [], False
        for line in self.get(f"{path}/taskInstances/{task.stage}/logs/{max(1, task.tries)}")["content"]:
            event = line["event"] if isinstance(line, dict) else str(line)
            if event.startswith("::"):
                folded = event.startswith("::group::")
            elif not folded:
                said += [event, *(f"{error['exc_value']}" for error in line.get("error_detail") or ())]
        return "\n".join(f"      | {text}" for text in said[-LOG_LINES:])

    def _manifest(self, path: str, stage: str) -> Manifest:
        if (path, stage) not in self._manifests:
            uri = str(self.get(f"{path}/taskInstances/{stage}/xcomEntries/return_value")["value"])
            self._manifests[path, stage] = Store(uri.partition("/artifacts/")[0]).by_uri(uri).manifest
        return self._manifests[path, stage]

    @staticmethod
    def _json(answer: httpx.Response) -> Any:
        if answer.is_error:
            raise FlywheelError(
                f"Airflow answered {answer.status_code} to {answer.request.url.path}: {answer.text[:500]}"
            )
        return answer.json()


def describe(task: Task) -> str:
    if task.state not in DONE:
        return ""
    rows = task.manifest.rows if task.manifest else None
    count = (
        f"   {rows.rows_in:,} {rows.unit}s in, {rows.rows_out:,} out, {rows.rows_rejected:,} rejected" if rows else ""
    )
    return f"{task.seconds:6.1f} s{count}"
