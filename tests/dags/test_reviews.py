"""The wait for annotators: it ends with enough reviews, at the deadline, or when it goes wrong, and never fails."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ab_readout
import character_flywheel
import httpx
import psutil
import pytest
import reviews
from airflow.sdk.bases.operator import TRIGGER_FAIL_REPR, TriggerFailureReason
from airflow.sdk.exceptions import AirflowSkipException, ParamValidationError, TaskDeferred
from launch import parameters
from reviews import AT_LEAST, DEADLINE, AwaitReviews

from flywheel_tasks import processes
from flywheel_tasks.annotation.trigger import ReviewsTrigger
from flywheel_tasks.core.errors import ConfigError
from flywheel_tasks.pipeline import STAGES
from flywheel_tasks.services import Endpoints
from tests.annotation import worlds

DAGS = Path(reviews.__file__).parent
UP = """
import time
from flywheel_tasks import services
with services.running(print, whole={whole}) as (endpoints, check):
    print("ready", flush=True)
    while True:
        check()
        time.sleep(1)
"""
TASK = character_flywheel.dag.get_task("await-reviews")


@pytest.fixture
def world(tmp_path: Path, user_key: bytes) -> worlds.World:
    """Four pairs that three people each were asked to review."""
    found = worlds.World(tmp_path)
    sent = found.export(worlds.pairs(4), "2026-W47")
    found.store.point("2026-W47", sent.manifest)
    return found


def deliver(world: worlds.World, name: str, *people: str, tasks: int = 4) -> None:
    worlds.write(world.inbox, name, [worlds.line(task, who) for task in world.tasks()[:tasks] for who in people])


def trigger(world: worlds.World, at_least: int, seconds: float, poll: float = 0.02) -> ReviewsTrigger:
    deadline = (dt.datetime.now(dt.UTC) + dt.timedelta(seconds=seconds)).isoformat()
    return ReviewsTrigger(world.store.uri, world.exports[-1].uri, [f"{world.inbox}/*"], at_least, deadline, poll)


async def fired(waiting: ReviewsTrigger) -> list[dict[str, Any]]:
    return [event.payload async for event in waiting.run()]


def test_it_fires_when_the_minimum_is_there(world: worlds.World) -> None:
    async def scenario() -> list[dict[str, Any]]:
        running = asyncio.create_task(fired(trigger(world, 8, seconds=60)))
        for name, person in (("261118-a.jsonl", "a"), ("261118-b.jsonl", "b")):
            await asyncio.sleep(0.2)
            assert not running.done(), f"8 reviews were not there before {name}"
            deliver(world, name, person)
        return await asyncio.wait_for(running, 30)

    assert asyncio.run(scenario()) == [{"why": "enough", "there": 8, "wanted": 12}]


@pytest.mark.parametrize("there", [0, 4])
def test_it_fires_at_the_deadline_with_what_is_there(world: worlds.World, there: int) -> None:
    if there:
        deliver(world, "261118-a.jsonl", "a")
    began = time.monotonic()
    # Longer than the wait: the deadline is not rounded up to the next poll.
    assert asyncio.run(fired(trigger(world, 8, seconds=0.5, poll=60))) == [
        {"why": "late", "there": there, "wanted": 12}
    ]
    assert 0.4 < time.monotonic() - began < 20


def test_what_comes_in_the_last_moment_counts(world: worlds.World) -> None:
    async def scenario() -> list[dict[str, Any]]:
        running = asyncio.create_task(fired(trigger(world, 12, seconds=1.5, poll=60)))
        await asyncio.sleep(0.5)
        deliver(world, "261118-a.jsonl", "a")
        return await running

    assert asyncio.run(scenario()) == [{"why": "late", "there": 4, "wanted": 12}]


def test_other_triggers_go_on_while_it_looks(world: worlds.World, monkeypatch: pytest.MonkeyPatch) -> None:
    from flywheel_tasks.annotation import waiting

    real = waiting.Inbox.look
    monkeypatch.setattr(waiting.Inbox, "look", lambda self: time.sleep(0.5) or real(self))

    async def scenario() -> int:
        running, ticks = asyncio.create_task(fired(trigger(world, 8, seconds=0.1))), 0
        while not running.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks

    assert asyncio.run(scenario()) > 10


def test_deliveries_that_cannot_be_read_end_with_the_deadline(world: worlds.World) -> None:
    unreachable = trigger(world, 8, seconds=0.3)
    unreachable.store = f"{world.store.uri}-gone"
    assert asyncio.run(fired(unreachable)) == [{"why": "late"}]


def test_the_triggerer_can_make_it_again_without_the_dag_folder(world: worlds.World) -> None:
    path, kwargs = trigger(world, 8, seconds=60).serialize()
    code = (
        "import sys, json; from airflow._shared.module_loading import import_string\n"
        "again = import_string(sys.argv[1])(**json.loads(sys.argv[2])); print(json.dumps(again.serialize()))"
    )
    argv = [sys.executable, "-c", code, path, json.dumps(kwargs)]
    done = subprocess.run(argv, capture_output=True, text=True, cwd="/", timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [path, kwargs]


def context(world: worlds.World, at_least: int, hours: float = 1, sent: bool = True, **other: Any) -> dict[str, Any]:
    overrides = [f"store.uri={world.store.uri}", f'annotate-import.deliveries=["{world.inbox}/*"]']
    params = {"profile": "test", "cycle": "", "overrides": overrides, AT_LEAST: at_least, DEADLINE: hours} | other
    ti = SimpleNamespace(xcom_pull=lambda task_ids: world.exports[-1].uri if sent else None)
    run = SimpleNamespace(logical_date=None, run_after=dt.datetime(2026, 11, 18, tzinfo=dt.UTC))
    return {"params": params, "ti": ti, "dag_run": run}


def execute(given: dict[str, Any]) -> None:
    AwaitReviews.execute.__wrapped__(TASK, given)


def test_nobody_waits_unless_the_form_says_so(world: worlds.World) -> None:
    with pytest.raises(AirflowSkipException, match="reviews_at_least is 0"):
        execute(context(world, 0))
    with pytest.raises(AirflowSkipException, match="annotate-import is skipped"):
        execute(context(world, 8, skip=["annotate-import"]))


@pytest.mark.parametrize("sent", [True, False])
def test_it_waits_in_the_triggerer_from_the_export_to_the_deadline(world: worlds.World, sent: bool) -> None:
    """A run that skips the export waits for what the cycle sent before."""
    with pytest.raises(TaskDeferred) as deferred:
        execute(context(world, 8, hours=2, sent=sent))
    waiting = deferred.value.trigger
    deadline = world.exports[-1].manifest.finished + dt.timedelta(hours=2)
    assert waiting.deadline == deadline.isoformat()
    assert (waiting.export, waiting.at_least) == (world.exports[-1].uri, 8)
    assert waiting.deliveries == [f"{world.inbox}/*"]
    left = deadline - dt.datetime.now(dt.UTC)
    assert left < deferred.value.timeout < left + reviews.GRACE + dt.timedelta(minutes=1)
    assert deferred.value.method_name == "go_on"


def test_enough_reviews_or_a_past_deadline_need_no_triggerer(world: worlds.World, capsys: Any) -> None:
    execute(context(world, 8, hours=0))
    assert "the deadline has passed: 0 of 12 are there" in capsys.readouterr().out
    deliver(world, "261118-a.jsonl", "a", "b")
    execute(context(world, 8))
    assert "enough reviews: 8 of 12 are there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sent", "wrong", "why"),
    [
        (True, {"profile": "huge"}, "huge"),
        (True, {"overrides": ["annotate-import.deliveries=7"]}, "annotate-import.deliveries"),
        (True, {"overrides": ["store.uri=/tmp/another"]}, "not a manifest of this store"),
        (False, {"cycle": "2026-W40"}, "annotate-export has no artifact in 2026-W40"),
    ],
)
def test_what_goes_wrong_is_left_to_the_import(
    world: worlds.World, sent: bool, wrong: dict[str, Any], why: str, capsys: Any
) -> None:
    """The import says it too, and stops the cycle where it must."""
    execute(context(world, 8, sent=sent, **wrong))
    said = capsys.readouterr().out
    assert "not waiting: " in said
    assert why in said


def test_without_deliveries_nothing_is_waited_for(world: worlds.World, capsys: Any) -> None:
    execute(context(world, 8, overrides=[f"store.uri={world.store.uri}"]))
    assert "annotate-import.deliveries is empty" in capsys.readouterr().out


@pytest.mark.parametrize("error", TriggerFailureReason)
def test_a_trigger_that_failed_or_never_ran_ends_the_wait(error: str, capsys: Any) -> None:
    given = {"error": error, "traceback": ["no such module\n"]}
    assert TASK.resume_execution(TRIGGER_FAIL_REPR, given, {}) is None
    assert "no longer waiting" in capsys.readouterr().out


def test_it_stands_before_the_import_alone() -> None:
    importing = character_flywheel.dag.get_task("annotate-import")
    assert "await-reviews" in importing.upstream_task_ids
    assert (TASK.upstream_task_ids, TASK.downstream_task_ids) == ({"annotate-export"}, {"annotate-import"})
    assert TASK.task_group.group_id == "annotation"
    assert (TASK.trigger_rule, importing.trigger_rule) == ("none_failed", "none_failed")
    assert "await-reviews" not in ab_readout.dag.task_ids


def test_the_form_asks_it_of_the_cycle_only(monkeypatch: pytest.MonkeyPatch) -> None:
    params = character_flywheel.dag.params
    assert (params[AT_LEAST], params[DEADLINE]) == (0, 24)
    assert AT_LEAST not in ab_readout.dag.params
    for name, value in ((AT_LEAST, -1), (AT_LEAST, 1.5), (AT_LEAST, "many"), (DEADLINE, 168), (DEADLINE, -1)):
        with pytest.raises(ParamValidationError):
            params.get_param(name).resolve(value=value)


def test_scheduled_runs_take_the_environments_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLYWHEEL_REVIEWS_AT_LEAST", "500")
    monkeypatch.setenv("FLYWHEEL_REVIEWS_DEADLINE_HOURS", "1.5")
    weekly = parameters([stage for stage in STAGES if stage.schedule == "weekly"])
    assert (weekly[AT_LEAST].resolve(), weekly[DEADLINE].resolve()) == (500, 1.5)
    for wrong in ("-1", "1.5", "many", ""):
        monkeypatch.setenv("FLYWHEEL_REVIEWS_AT_LEAST", wrong)
        with pytest.raises(ConfigError, match=r"FLYWHEEL_REVIEWS_AT_LEAST=.*: set it to a whole number from 0"):
            reviews.form()


WAITING = """
import sys
from datetime import timedelta
sys.path.insert(0, {dags!r})
import reviews
from airflow.sdk import DAG, Param, task
from reviews import AwaitReviews, form
reviews.GRACE = timedelta(seconds=1)
typed = {{"profile": Param("test"), "cycle": Param(""), "overrides": Param({overrides!r}), "skip": Param(None)}}
with DAG("waiting", schedule=None, is_paused_upon_creation=False, params=typed | form()) as dag:
    @task(task_id="annotate-export")
    def sent():
        return {uri!r}
    @task(task_id="annotate-import", trigger_rule="none_failed")
    def collect():
        return "imported"
    wait = AwaitReviews(task_id="await-reviews", after="annotate-export", before="annotate-import", poll_seconds=1)
    sent() >> wait >> collect()
"""


class Running:
    """Airflow with its scheduler and, if the whole is wanted, its triggerer, and one DAG that waits."""

    def __init__(self, folder: Path, world: worlds.World, whole: bool) -> None:
        (folder / "dags").mkdir()
        overrides = context(world, 0)["params"]["overrides"]
        text = WAITING.format(dags=str(DAGS), uri=world.exports[-1].uri, overrides=overrides)
        (folder / "dags" / "waiting.py").write_text(text)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW", "FLYWHEEL_"))}
        environment |= {"FLYWHEEL_HOME": str(folder / "home"), "AIRFLOW__CORE__DAGS_FOLDER": str(folder / "dags")}
        self.log = folder / "up.log"
        with self.log.open("wb") as log:
            argv = [sys.executable, "-c", UP.format(whole=whole)]
            self.process = subprocess.Popen(argv, env=environment, stdout=log, stderr=log)
        self.until(lambda: "ready" in self.log.read_text(), 240)
        self.endpoints = Endpoints(**json.loads((folder / "home" / "services.json").read_text()))
        login = {"username": self.endpoints.user, "password": self.endpoints.password()}
        token = httpx.post(f"{self.endpoints.airflow}/auth/token", json=login, timeout=60).json()["access_token"]
        headers = {"Authorization": f"Bearer {token}"}
        self.api = httpx.Client(base_url=f"{self.endpoints.airflow}/api/v2", headers=headers, timeout=60)
        self.until(lambda: self.api.get("/dags").json()["total_entries"] == 1, 60)

    def until(self, condition: Any, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"not within {seconds} s"
            time.sleep(0.5)

    def start(self, run: str, **conf: Any) -> None:
        body = {"dag_run_id": run, "logical_date": None, "conf": conf}
        self.api.post("/dags/waiting/dagRuns", json=body).raise_for_status()

    def states(self, run: str) -> dict[str, str]:
        found = self.api.get(f"/dags/waiting/dagRuns/{run}/taskInstances").json()["task_instances"]
        return {task["task_id"]: task["state"] for task in found}

    def said(self, run: str) -> str:
        logs = f"/dags/waiting/dagRuns/{run}/taskInstances/await-reviews/logs/1"
        return str(self.api.get(logs, headers={"Accept": "application/json"}).text)

    def listening(self) -> set[str]:
        tree = processes.descendants([psutil.Process(self.process.pid)])
        found = (c for p in tree for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN)
        return {f"http://{c.laddr.ip}:{c.laddr.port}" for c in found}


@pytest.fixture
def running(tmp_path: Path, world: worlds.World, request: pytest.FixtureRequest) -> Iterator[Running]:
    found = Running(tmp_path, world, request.param)
    yield found
    found.process.terminate()
    found.process.wait(30)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("running", [True], indirect=True)
def test_a_run_waits_in_the_real_triggerer_and_goes_on(running: Running, world: worlds.World) -> None:
    over = {"annotate-export": "success", "await-reviews": "success", "annotate-import": "success"}
    running.start("waits", **{AT_LEAST: 8})
    running.until(lambda: running.states("waits").get("await-reviews") == "deferred", 120)
    running.start("late", **{AT_LEAST: 8, DEADLINE: 1e-6})
    running.start("instant")
    running.until(lambda: running.states("late") == over, 120)
    running.until(lambda: running.states("instant") == over | {"await-reviews": "skipped"}, 120)
    assert running.listening() == {running.endpoints.airflow, running.endpoints.mlflow}
    assert running.states("waits")["await-reviews"] == "deferred"
    deliver(world, "261118-a.jsonl", "a", "b")
    running.until(lambda: running.states("waits") == over, 120)
    assert "0 of 12 reviews, waiting for 8 until" in running.said("waits")
    assert "enough reviews: 8 of 12 are there" in running.said("waits")
    assert "the deadline has passed: 0 of 12 are there" in running.said("late")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("running", [False], indirect=True)
def test_without_a_triggerer_the_deadline_still_holds(running: Running, world: worlds.World) -> None:
    elapsed = (dt.datetime.now(dt.UTC) - world.exports[-1].manifest.finished).total_seconds()
    running.start("alone", **{AT_LEAST: 8, DEADLINE: (elapsed + 30) / 3600})
    running.until(lambda: running.states("alone").get("await-reviews") == "deferred", 60)
    running.until(lambda: running.states("alone").get("annotate-import") == "success", 180)
    assert running.states("alone")["await-reviews"] == "success"
    assert "no longer waiting: " in running.said("alone")
