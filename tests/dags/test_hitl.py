"""A HOLD as a person meets it: Airflow really waits, shows why, takes the answer, and the ledger keeps it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flywheel_tasks.release import ledger
from flywheel_tasks.services import Endpoints
from tests.release.promotion_world import World

DAGS = Path(__file__).resolve().parents[2] / "dags"
UP = "from flywheel_tasks import services; services.up(lambda line: print(line, flush=True))"
HELD = """
import sys
sys.path.insert(0, {dags!r})
from airflow.sdk import DAG, Param, task
from approval import Approval, form
form_of_run = {{"profile": Param("test", type="string")}}
with DAG("held", schedule=None, is_paused_upon_creation=False, params=form_of_run) as dag:
    @task
    def promote():
        return {uri!r}
    promote() >> Approval(task_id="approve", after="promote", params=form(), retries=0)
"""
ANSWERABLE_AFTER_SECONDS = 12
"""Airflow 3.3 fails a task that is answered in the first seconds of its wait."""


class Waiting:
    """Airflow with one DAG that holds, and the store behind it."""

    def __init__(self, folder: Path) -> None:
        self.world = World(folder / "world")
        uri = self.world.promote("HOLD").uri
        (folder / "dags").mkdir()
        (folder / "dags" / "held.py").write_text(HELD.format(dags=str(DAGS), uri=uri))
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW", "FLYWHEEL"))}
        environment |= {
            "FLYWHEEL_HOME": str(folder / "home"),
            "AIRFLOW__CORE__DAGS_FOLDER": str(folder / "dags"),
            "MLFLOW_TRACKING_URI": self.world.tracking,
        }
        with (folder / "up.log").open("wb") as log:
            self.process = subprocess.Popen([sys.executable, "-c", UP], env=environment, stdout=log, stderr=log)
        self.until(lambda: "Ctrl-C" in (folder / "up.log").read_text(), 240)
        self.endpoints = Endpoints(**json.loads((folder / "home" / "services.json").read_text()))
        login = {"username": self.endpoints.user, "password": self.endpoints.password()}
        token = httpx.post(f"{self.endpoints.airflow}/auth/token", json=login, timeout=60).json()["access_token"]
        headers = {"Authorization": f"Bearer {token}"}
        self.api = httpx.Client(base_url=f"{self.endpoints.airflow}/api/v2", headers=headers, timeout=60)
        self.until(lambda: self.api.get("/dags").json()["total_entries"] == 1, 60)

    def until(self, condition: Callable[[], Any], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, "the services ended first"
            assert time.monotonic() < deadline, f"not within {seconds} s"
            time.sleep(0.5)

    def hold(self, run: str) -> None:
        """Trigger a run and wait until it waits."""
        body = {"dag_run_id": run, "logical_date": None, "conf": {}}
        self.api.post("/dags/held/dagRuns", json=body).raise_for_status()
        self.until(lambda: self.state(run) == "awaiting_input", 180)
        time.sleep(ANSWERABLE_AFTER_SECONDS)

    def state(self, run: str) -> str | None:
        found = self.api.get(f"/dags/held/dagRuns/{run}/taskInstances").json()["task_instances"]
        return next((task["state"] for task in found if task["task_id"] == "approve"), None)

    def kept(self) -> list[tuple[str, str, str]]:
        return [(entry.action, entry.by, entry.why) for entry in ledger.read(self.world.store.storage).entries]


@pytest.fixture
def waiting(tmp_path: Path, user_key: bytes) -> Iterator[Waiting]:
    found = Waiting(tmp_path)
    yield found
    found.process.terminate()
    found.process.wait(30)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hold_is_approved_in_the_ui(waiting: Waiting, tmp_path: Path):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api")
    waiting.hold("r1")
    address = waiting.endpoints.airflow
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(60_000)
        page.goto(address, wait_until="domcontentloaded")
        page.fill("input[name=username]", waiting.endpoints.user)
        page.fill("input[name=password]", waiting.endpoints.password())
        page.keyboard.press("Enter")
        page.wait_for_url(lambda url: "login" not in url)
        page.goto(f"{address}/dags/held/runs/r1/tasks/approve/required_actions", wait_until="domcontentloaded")
        page.get_by_text("HOLD: as told").wait_for()
        approve = page.get_by_role("button", name="Approve")
        approve.wait_for()
        assert approve.is_disabled(), "no approval without a reason"
        page.locator("[name=element_why]").fill("read the evidence")
        page.screenshot(path=tmp_path / "hold.png")
        approve.click()
        waiting.until(lambda: waiting.state("r1") in ("success", "failed"), 120)
        browser.close()
    assert waiting.state("r1") == "success"
    assert waiting.kept() == [("nominate", "admin", "read the evidence")]
