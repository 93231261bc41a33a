"""The adapter against a real Label Studio, started on loopback from its own environment.

FLYWHEEL_LABEL_STUDIO names its command (for example .venv-labelstudio/bin/label-studio); without it nothing runs here.
"""

from __future__ import annotations

import datetime as dt
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flywheel_tasks.annotation import label_studio_server, publish
from flywheel_tasks.annotation.contract import Task
from flywheel_tasks.annotation.label_studio_server import Server
from flywheel_tasks.core import ids
from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.simulation import annotators
from tests.annotation import worlds
from tests.annotation.test_label_studio import HOSTILE, hostile_pairs, results

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TODAY = dt.datetime.now(dt.UTC).date()
"""The server dates its answers itself, and a delivery takes none of another year or week."""
CYCLE = ids.cycle_of(TODAY)
LOGIN = "annotator@example.com"
PASSWORD = secrets.token_hex(16)
TOKEN = secrets.token_hex(20)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = os.environ.get("FLYWHEEL_LABEL_STUDIO")
    if not command:
        pytest.skip("set FLYWHEEL_LABEL_STUDIO to the label-studio command of an environment of its own")
    folder = tmp_path_factory.mktemp("label-studio")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(folder), "LABEL_STUDIO_BASE_DATA_DIR": str(folder),
        "LABEL_STUDIO_USERNAME": LOGIN, "LABEL_STUDIO_PASSWORD": PASSWORD, "LABEL_STUDIO_USER_TOKEN": TOKEN,
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true", "COLLECT_ANALYTICS": "False", "SENTRY_DSN": "",
        "FRONTEND_SENTRY_DSN": "", "LATEST_VERSION_CHECK": "False",
    }  # fmt: skip
    arguments = ["start", "--no-browser", "--internal-host", "127.0.0.1", "-p", str(port), "--enable-legacy-api-token"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [str(Path(command).absolute()), *arguments], env=environment, cwd=folder, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    try:
        found = Server(f"http://127.0.0.1:{port}", TOKEN)
        _wait(found, process, folder / "log")
        yield found
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


def _wait(server: Server, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    pytest.fail(f"Label Studio did not start: {log.read_text()[-2000:]}")


@pytest.fixture
def world(tmp_path: Path, user_key: bytes) -> worlds.World:
    world = worlds.World(tmp_path)
    world.export(hostile_pairs(16), CYCLE)
    return world


def pushed(server: Server, world: worlds.World) -> dict[str, int]:
    files = publish.read(str(world.outbox), world.exports[0].json("report")["export"])
    made = label_studio_server.push(server, "flywheel", files, {}, lambda projects: None)
    return {mode: project.number for mode, project in made.items()}


def on_server(server: Server, project: int) -> dict[str, dict[str, Any]]:
    """Task id of ours → task of the server."""
    rows = server.call("GET", f"/api/tasks/?project={project}&page_size=100&fields=all")["tasks"]
    return {row["data"]["task_id"]: row for row in rows}


def submit(server: Server, task: dict[str, Any], review: Any, user: int | None = None) -> None:
    body = {"result": results(review), "lead_time": review.seconds, "was_cancelled": False}
    if user is not None:
        body["completed_by"] = user
    server.call("POST", f"/api/tasks/{task['id']}/annotations/", body)


def test_there_and_back(server: Server, world: worlds.World) -> None:
    """Projects, tasks, answers of three people by API, the export, and the import: what comes out is what three
    annotators who answered through our own lines would have given."""
    projects = pushed(server, world)
    assert set(projects) == {"static", "interactive", "steerability", "image"}
    for mode, project in projects.items():
        assert server.task_ids(project) == {task.task_id for task in world.tasks() if task.mode == mode}
    team = annotators.team(3, 5)
    people = [
        int(server.call("POST", "/api/users/", {"username": person.name, "email": f"{person.name}@example.com"})["id"])
        for person in team
    ]
    said: dict[tuple[str, str], str] = {}
    tasks: list[Task] = world.tasks()
    altered, skipped = [task for task in tasks if task.mode == "static"][:2]
    for mode, project in projects.items():
        rows = on_server(server, project)
        assert set(rows) == {task.task_id for task in tasks if task.mode == mode}
        for task in tasks:
            if task.mode != mode or task is skipped:
                continue
            for person, user in list(zip(team, people, strict=True))[: task.reviewers]:
                review = annotators.review(person, task, worlds.line(task).at, 5)
                submit(server, rows[task.task_id], review, user)
                if task is not altered:
                    said[task.task_id, person.name] = review.preferred
    row = on_server(server, projects["static"])[altered.task_id]
    server.call("PATCH", f"/api/tasks/{row['id']}/", {"data": row["data"] | {"left": "I never said that."}})
    world.inbox.mkdir()
    for mode, project in projects.items():
        (world.inbox / f"{TODAY:%y%m%d}-{mode}.json").write_bytes(server.export(project))
    imported = world.collect(CYCLE)
    assert dict(imported.manifest.rows.reasons) == {"altered_text": 3}
    annotations = imported.table("annotations").read().to_pylist()
    ledger = {row["pair_id"]: row for row in imported_ledger(world)}
    sides = {"left": lambda row: row["left"], "right": lambda row: "y1" if row["left"] == "y0" else "y0"}
    expected = sorted(
        sides[preferred](row) if preferred in sides else preferred
        for (task_id, _), preferred in said.items()
        for row in ledger.values()
        if row["task_id"] == task_id
    )
    assert sorted(row["preferred"] for row in annotations) == expected
    assert len({row["annotator"] for row in annotations}) == 3
    assert imported.json("report")["sessions_going_on"] == {"interactive": 4, "steerability": 4}


def imported_ledger(world: worlds.World) -> list[dict[str, Any]]:
    return world.exports[0].table("tasks").read().to_pylist()


def test_a_person_answers_on_the_rendered_page(server: Server, world: worlds.World, tmp_path: Path) -> None:
    """In headless Chromium: hostile text stands there as text, and a submitted page comes back as a review."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api")
    projects = pushed(server, world)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1500, "height": 1700})
        page.goto(f"{server.url}/user/login/", wait_until="domcontentloaded")
        page.fill("input[name=email]", LOGIN)
        page.fill("input[name=password]", PASSWORD)
        page.click("button[type=submit]")
        page.wait_for_url(lambda url: "login" not in url, timeout=120_000, wait_until="domcontentloaded")
        for mode, project in projects.items():
            page.goto(f"{server.url}/projects/{project}/data?labeling=1", wait_until="domcontentloaded")
            page.get_by_text("Which reply is more engaging?").wait_for(timeout=180_000)
            assert page.get_by_text("window.hacked=2").count() >= 2, "history and response show markup as text"
            assert HOSTILE.split("\n")[0] in page.locator(".fw-two").inner_text()
            for group in page.locator(".fw-two .fw-q").all():
                group.locator("label").first.click()
            page.locator(".fw-ask label", has_text="Right").click()
            page.locator(".fw-ask label", has_text="clearly").click()
            page.locator(".fw-ask textarea").first.fill("Come in, mind the <stairs>.")
            if mode in ("interactive", "steerability"):
                page.locator(".fw-ask textarea").nth(1).fill("And then?")
            page.screenshot(path=tmp_path / f"{mode}.png")
            page.locator("button[name=submit]").click()
            _submitted(server, project)
            assert page.evaluate("window.hacked") is None
        browser.close()
    world.inbox.mkdir()
    for mode, project in projects.items():
        (world.inbox / f"{TODAY:%y%m%d}-{mode}.json").write_bytes(server.export(project))
    imported = world.collect(CYCLE)
    assert dict(imported.manifest.rows.reasons) == {}
    annotations = imported.table("annotations").read().to_pylist()
    ledger = {row["pair_id"]: row for row in imported_ledger(world)}
    assert {row["mode"] for row in annotations} == set(projects)
    for row in annotations:
        assert row["preferred"] != ledger[row["pair_id"]]["left"]
        assert (row["strength"], row["rewrite"]) == (2, "Come in, mind the <stairs>.")
        assert {q["name"] for q in row["questions"]} >= {"false_refusal", "templated"}
    assert imported.json("report")["sessions_going_on"] == {"interactive": 1, "steerability": 1}


def _submitted(server: Server, project: int) -> None:
    deadline = time.monotonic() + 60
    while not any(row["total_annotations"] for row in on_server(server, project).values()):
        assert time.monotonic() < deadline, "the page did not submit"
        time.sleep(0.5)


def test_a_server_that_refuses_or_is_not_there_says_so_in_one_line(server: Server) -> None:
    with pytest.raises(FlywheelError, match=r"refused POST /api/projects/ \(400\)"):
        server.create_project("bad", "<View>", 1)
    with pytest.raises(FlywheelError, match=r"\(401\)"):
        Server(server.url, "0" * 40).create_project("bad", "<View/>", 1)
    with pytest.raises(FlywheelError, match="is it running"):
        Server("http://127.0.0.1:9", TOKEN).create_project("bad", "<View/>", 1)
