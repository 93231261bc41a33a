"""`make demo`: users chat with the champion for a week, then one whole cycle through the Airflow DAG.

The cycle runs as it does with people in it: first the pairs go out, then annotators answer, then the same cycle runs
again and goes on from what came back. What the first run made is found, not made again.
"""

from __future__ import annotations

import datetime
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from flywheel_tasks.core import ids
from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.core.manifest import Manifest
from flywheel_tasks.core.store import Store
from flywheel_tasks.pipeline import STAGES, load_config, weekly
from flywheel_tasks.services import Endpoints, banner, running, state_dir

DAG = "character_flywheel"
USERS, DAYS, SEED = 100, 7, 17
ANNOTATORS, NOISE = 6, 0.1
LAST_BEFORE_PEOPLE = "annotate-export"
LOG_LINES = 25
EXPORTS, DELIVERIES = "exports", "deliveries"
HELD = "held"
DONE = ("success", "failed", "skipped", "upstream_failed", "removed")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """The last state of one task of the run, and its artifact where it has one."""

    stage: str
    state: str
    seconds: float
    tries: int
    manifest: Manifest | None = None


def run_demo(cycle: str, say: Say) -> int:
    """Returns the exit code: 0 when every stage succeeded, whatever the gate decided."""
    began = time.monotonic()
    os.umask(0o077)
    cycle = ids.cycle_id(cycle) if cycle else ids.cycle_of(datetime.datetime.now(datetime.UTC).date())
    world = traffic(cycle, say)
    with running(say, whole=False) as (endpoints, check):
        say(banner(endpoints))
        airflow = Airflow(endpoints)
        airflow.wait_for_dag(check)
        paused = airflow.pause(False)
        try:
            names = [stage.name for stage in weekly()]
            after_people = names[names.index(LAST_BEFORE_PEOPLE) + 1 :]
            started, tasks, state = run_cycle(airflow, cycle, world, after_people, check, say)
            if state == "success":
                reviews(world, cycle, say)
                _, tasks, state = run_cycle(airflow, cycle, world, [], check, say)
        finally:
            if paused:
                airflow.pause(True)
    show(tasks, started)
    say(f"\nCycle {cycle}: {state} in {time.monotonic() - began:.0f} s.")
    for store in sorted({t for task in tasks if (t := airflow.store_of(task.stage))}):
        for line in decision(Store(store), tasks, cycle):
            say(f"  {line}")
        say(f"  Store     {store}")
    say(f"  State     {state_dir()}")
    say(f"  'make up' opens Airflow and MLflow again (user {endpoints.user}, password in {endpoints.password_file}).")
    return 0 if state in ("success", HELD) else 1


def traffic(cycle: str, say: Say) -> Path:
    """The week before the cycle, chatted with the champion and written once; returns the folder of logs and cards."""
    from flywheel_tasks.release.reign import for_stage
    from flywheel_tasks.simulation import world

    folder = state_dir() / "demo" / cycle
    if not folder.exists():
        config = load_config("demo")
        store = Store(config.store.uri)
        policy = for_stage(config, "pairs", store, cycle).models.policy
        start = ids.cycle_start(cycle) - datetime.timedelta(days=DAYS)
        say(f"{USERS} simulated users chat with {policy.path} for {DAYS} days from {start} ...")
        unfinished = folder.with_name(f"{cycle}.{secrets.token_hex(4)}")
        try:
            version = policy.path.rpartition(":")[2] if ":" in policy.path else policy.path.split("/")[-2][:12]
            truth = world.chat_with(policy, version, unfinished, users=USERS, days=DAYS, seed=SEED, start=start)
            os.rename(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        say(f"{truth.lines:,} log lines of {len(truth.conversations):,} conversations in {folder}")
    return folder


def reviews(world_folder: Path, cycle: str, say: Say) -> None:
    """Annotators answer what went out; an export that has its delivery is not answered again."""
    from flywheel_tasks.simulation import world

    day = ids.cycle_start(cycle)
    given = world.answer(
        world_folder / EXPORTS, world_folder / DELIVERIES, people=ANNOTATORS, noise=NOISE, seed=SEED, day=day
    )
    say(f"\n{ANNOTATORS} simulated annotators sent {given:,} reviews." if given else "\nEvery export has its reviews.")


def run_cycle(
    airflow: Airflow, cycle: str, world: Path, skip: list[str], check: Callable[[], None], say: Say
) -> tuple[datetime.datetime, list[Task], str]:
    """One run of the DAG, followed to its end: when it started, its tasks, and how it ended."""
    conf = {"cycle": cycle, "profile": "demo", "overrides": overrides(world), "skip": skip, "reviews_at_least": 0}
    run_id = airflow.trigger(f"demo-{cycle}-{datetime.datetime.now():%Y%m%dT%H%M%S}", conf)
    say(f"\nCycle {cycle}: run {run_id}")
    tasks, state = follow(airflow, run_id, check, say)
    started = airflow.get(f"/dags/{DAG}/dagRuns/{run_id}")["start_date"]
    return datetime.datetime.fromisoformat(started), tasks, state


def overrides(world: Path) -> list[str]:
    """Where this week's logs, cards, exports and deliveries are."""
    return [
        f"ingest.logs={json.dumps([str(world / 'logs' / '*')])}",
        f"ingest.characters={json.dumps([str(world / 'characters.jsonl')])}",
        f"annotate-export.folder={json.dumps(str(world / EXPORTS))}",
        f"annotate-import.deliveries={json.dumps([str(world / DELIVERIES / '*.jsonl')])}",
    ]


def follow(airflow: Airflow, run_id: str, check: Callable[[], None], say: Say) -> tuple[list[Task], str]:
    """Print each change of a task until the run ends or waits for a person; of a failure, the end of its log."""
    last: dict[str, tuple[str, int]] = {}
    while True:
        check()
        state = airflow.get(f"/dags/{DAG}/dagRuns/{run_id}")["state"]
        tasks = airflow.tasks(run_id)
        for task in tasks:
            now = (task.state, task.tries)
            if last.get(task.stage) == now or task.state in ("none", "scheduled", "queued", "skipped"):
                continue
            last[task.stage] = now
            say(f"  {datetime.datetime.now():%H:%M:%S}  {task.stage:<22} {task.state:<14} {describe(task)}")
            if task.state in ("failed", "up_for_retry"):
                say(airflow.log_tail(run_id, task))
        if state in ("success", "failed"):
            return tasks, state
        if any(task.state == "awaiting_input" for task in tasks):
            return tasks, HELD
        time.sleep(1)


def decision(store: Store, tasks: list[Task], cycle: str) -> list[str]:
    """What the gate said and why, and what a person can do about it."""
    made = next((task.manifest for task in tasks if task.stage == "gate" and task.manifest), None)
    if made is None:
        return []
    found = store.get(made.stage, made.key).json("decision")
    against = [rule["reason"] for rule in found["rules"] if rule["verdict"] == found["decision"] != "PASS"]
    said = [f"Gate      {found['decision']}", *(f"          {reason}" for reason in against)]
    if found["decision"] == "HOLD":
        said.append(f"Answer    in Airflow, or: flywheel answer approve --cycle {cycle} --by NAME --why REASON")
    return said


def describe(task: Task) -> str:
    if task.state not in DONE:
        return ""
    rows = task.manifest.rows if task.manifest else None
    count = (
        f"   {rows.rows_in:,} {rows.unit}s in, {rows.rows_out:,} out, {rows.rows_rejected:,} rejected" if rows else ""
    )
    return f"{task.seconds:6.1f} s{count}"


def show(tasks: list[Task], started: datetime.datetime) -> None:
    """The summary table; a key this short is enough for `flywheel show`."""
    from rich.console import Console
    from rich.table import Table

    table = Table("stage", "state", box=None, pad_edge=False)
    for column in ("in", "out", "rejected", "seconds"):
        table.add_column(column, justify="right")
    table.add_column("artifact")
    for task in tasks:
        made = task.manifest
        rows = made.rows if made else None
        counts = [f"{n:,}" for n in (rows.rows_in, rows.rows_out, rows.rows_rejected)] if rows else ["", "", ""]
        state = "from store" if made and made.finished < started else task.state
        table.add_row(task.stage, state, *counts, f"{task.seconds:.1f}", made.key[:12] if made else "")
    Console().print("\n", table, sep="")


class Airflow:
    """The few calls of Airflow's REST API that the demo needs."""

    def __init__(self, endpoints: Endpoints) -> None:
        login = {"username": endpoints.user, "password": endpoints.password()}
        answer = httpx.post(
            f"{endpoints.airflow}/auth/token", json=login, timeout=60, trust_env=False
        ).raise_for_status()
        bearer = {"Authorization": f"Bearer {answer.json()['access_token']}"}
        self._http = httpx.Client(base_url=f"{endpoints.airflow}/api/v2", headers=bearer, timeout=60, trust_env=False)
        self._manifests: dict[str, Manifest] = {}
        self._uris: dict[str, str] = {}

    def get(self, path: str) -> Any:
        try:
            return self._json(self._http.get(path))
        except httpx.TransportError as error:
            raise FlywheelError(f"Airflow does not answer ({error}): see its logs in {state_dir() / 'logs'}") from error

    def wait_for_dag(self, check: Callable[[], None], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while self._http.get(f"/dags/{DAG}/details").status_code != 200:
            check()
            for error in self.get("/importErrors")["import_errors"]:
                problem = FlywheelError(f"Airflow cannot read {error['filename']}")
                problem.add_note(error["stack_trace"])
                raise problem
            if time.monotonic() > deadline:
                raise FlywheelError(
                    f"Airflow has not found the DAG '{DAG}' after {seconds:.0f} s: see the dag-processor's log"
                )
            time.sleep(0.5)

    def pause(self, paused: bool) -> bool:
        """Set whether the schedule runs; returns what it was."""
        before = self.get(f"/dags/{DAG}")["is_paused"]
        self._json(self._http.patch(f"/dags/{DAG}", json={"is_paused": paused}))
        return bool(before)

    def trigger(self, run_id: str, conf: dict[str, Any]) -> str:
        body = {"dag_run_id": run_id, "logical_date": None, "conf": conf}
        answer = self._http.post(f"/dags/{DAG}/dagRuns", json=body)
        return str(self._json(answer)["dag_run_id"])

    def tasks(self, run_id: str) -> list[Task]:
        rows = self.get(f"/dags/{DAG}/dagRuns/{run_id}/taskInstances")["task_instances"]
        order = {stage.name: place for place, stage in enumerate(STAGES)}
        return [
            Task(
                stage=row["task_id"],
                state=row["state"] or "none",
                seconds=row["duration"] or 0.0,
                tries=row["try_number"],
                manifest=self._manifest(run_id, row["task_id"]) if row["state"] == "success" else None,
            )
            for row in sorted(rows, key=lambda row: order.get(row["task_id"], len(order)))
        ]

    def store_of(self, stage: str) -> str:
        return self._uris.get(stage, "").partition("/artifacts/")[0]

    def log_tail(self, run_id: str, task: Task) -> str:
        """The end of the task's log without what Airflow says before and after the stage."""
        path = f"/dags/{DAG}/dagRuns/{run_id}/taskInstances/{task.stage}/logs/{max(1, task.tries)}"
        said, folded = [], False
        for line in self.get(path)["content"]:
            event = line["event"] if isinstance(line, dict) else str(line)
            if event.startswith("::"):
                folded = event.startswith("::group::")
            elif not folded:
                said += [event, *(f"{error['exc_value']}" for error in line.get("error_detail") or ())]
        return "\n".join(f"      | {text}" for text in said[-LOG_LINES:])

    def _manifest(self, run_id: str, stage: str) -> Manifest:
        if stage not in self._manifests:
            path = f"/dags/{DAG}/dagRuns/{run_id}/taskInstances/{stage}/xcomEntries/return_value"
            uri = self._uris[stage] = str(self.get(path)["value"])
            self._manifests[stage] = Store(uri.partition("/artifacts/")[0]).by_uri(uri).manifest
        return self._manifests[stage]

    @staticmethod
    def _json(answer: httpx.Response) -> Any:
        if answer.is_error:
            raise FlywheelError(
                f"Airflow answered {answer.status_code} to {answer.request.url.path}: {answer.text[:500]}"
            )
        return answer.json()
