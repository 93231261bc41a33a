"""From the command line to an HTTP server that keeps projects as Label Studio does, and back into an import."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from flywheel_tasks.annotation import commands
from flywheel_tasks.annotation.side_by_side import SideBySideConfig
from flywheel_tasks.core.config import FlywheelConfig
from tests.annotation import worlds
from tests.annotation.test_label_studio import results

CYCLE = "2026-W47"


class Projects(BaseHTTPRequestHandler):
    """Projects and their tasks; every task of an export carries one person's answer."""

    kept: dict[int, list[dict[str, Any]]]
    answers: dict[str, list[dict[str, Any]]]
    mishap: tuple[int, str] | None = None
    """The POST that goes wrong, counted from now: `refused` before anything was done, or `unanswered` after it."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        left, how = Projects.mishap or (0, "")
        Projects.mishap = (left - 1, how) if left > 1 else None
        if left == 1 and how == "refused":
            self._say(503, {"detail": "Try later."})
            return
        if self.path == "/api/projects/":
            self.kept[len(self.kept) + 1] = []
            said = {"id": len(self.kept)}
        else:
            self.kept[int(self.path.split("/")[3])] += body
            said = {"task_count": len(body)}
        if left == 1:
            self.close_connection = True
        else:
            self._say(201, said)

    def do_GET(self) -> None:
        if self.headers["Authorization"] != "Token right":
            self._say(401, {"detail": "Invalid token."})
            return
        rows = self.kept[int(self.path.split("/")[3])]
        found = [row | {"annotations": self.answers.get(row["data"]["task_id"], [])} for row in rows]
        self._say(200, [row for row in found if row["annotations"] or "download_all_tasks=true" in self.path])

    def _say(self, status: int, body: Any) -> None:
        said = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *_: object) -> None:
        """Nothing on the test's output."""


@pytest.fixture
def server() -> Iterator[str]:
    Projects.kept, Projects.answers, Projects.mishap = {}, {}, None
    with HTTPServer(("127.0.0.1", 0), Projects) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.fixture
def world(tmp_path: Path, user_key: bytes) -> worlds.World:
    world = worlds.World(tmp_path)
    made = world.export(worlds.pairs(12, modes={"static": 0.5, "interactive": 0.5}), CYCLE)
    world.store.point(CYCLE, made.manifest)
    return world


def command(world: worlds.World, *arguments: str) -> Result:
    app = typer.Typer()
    config = FlywheelConfig.model_validate({"store": {"uri": world.store.uri}}).model_copy(
        update={"stages": {"annotate-export": world.export_config, "side-by-side": SideBySideConfig()}}
    )
    commands.register(app, lambda profile, file, overrides: config)
    return CliRunner().invoke(app, list(arguments))


def test_an_export_goes_out_once_and_its_answers_come_back(
    world: worlds.World, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ("--cycle", CYCLE, "--url", server)
    assert "FLYWHEEL_LABEL_STUDIO_TOKEN is not set" in command(world, "label-push", *where).stderr
    monkeypatch.setenv("FLYWHEEL_LABEL_STUDIO_TOKEN", "right")
    early = command(world, "label-pull", *where, "--to", str(world.inbox))
    assert (early.exit_code, "run label-push first" in early.stderr) == (2, True)
    pushed = command(world, "label-push", *where)
    assert pushed.exit_code == 0, pushed.stderr
    assert set(json.loads(pushed.stdout)) == {"static", "interactive"}
    tasks = world.tasks()
    assert sorted(row["data"]["task_id"] for rows in Projects.kept.values() for row in rows) == sorted(
        task.task_id for task in tasks
    )
    again = command(world, "label-push", *where)
    assert (again.exit_code, "has 2026-W47" in again.stderr, len(Projects.kept)) == (2, True, 2)

    for number, answered in enumerate((tasks[:5], tasks), start=1):
        for task in answered:
            review = worlds.line(task, "somebody")
            Projects.answers[task.task_id] = [
                {"completed_by": 7, "result": results(review), "created_at": review.at.isoformat(), "lead_time": 9.0}
            ]
        pulled = command(world, "label-pull", *where, "--to", str(world.inbox))
        assert pulled.exit_code == 0, pulled.stderr
        assert sorted(pulled.stdout.split()) == sorted(path.name for path in world.inbox.iterdir())
        imported = world.collect(f"2026-W{46 + number}")
        assert imported.table("annotations").rows == len(answered)
    assert set(imported.manifest.rows.reasons) <= {"duplicate"}


def test_two_servers_answers_of_one_day_both_come_back(
    world: worlds.World, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLYWHEEL_LABEL_STUDIO_TOKEN", "right")
    tasks, urls = world.tasks(), (server, server.replace("127.0.0.1", "localhost"))
    for url in urls:
        assert command(world, "label-push", "--cycle", CYCLE, "--url", url).exit_code == 0
    for url, mine in zip(urls, (tasks[:5], tasks[5:]), strict=True):
        Projects.answers.clear()
        for task in mine:
            review = worlds.line(task)
            Projects.answers[task.task_id] = [
                {"completed_by": 7, "result": results(review), "created_at": review.at.isoformat(), "lead_time": 9.0}
            ]
        pulled = command(world, "label-pull", "--cycle", CYCLE, "--url", url, "--to", str(world.inbox))
        assert pulled.exit_code == 0, pulled.stderr
    assert world.collect(CYCLE).table("annotations").rows == len(tasks)


@pytest.mark.parametrize("mishap", [(n, how) for n in (1, 2, 3, 4) for how in ("refused", "unanswered")])
def test_a_push_that_broke_goes_on_where_it_stopped(
    world: worlds.World, server: str, monkeypatch: pytest.MonkeyPatch, mishap: tuple[int, str]
) -> None:
    """Nobody gets a task twice, and no project is made twice that the server has told the number of."""
    monkeypatch.setenv("FLYWHEEL_LABEL_STUDIO_TOKEN", "right")
    where = ("--cycle", CYCLE, "--url", server)
    Projects.mishap = mishap
    broken = command(world, "label-push", *where)
    assert (broken.exit_code, broken.stderr.count("\n")) == (1, 1), broken.stderr
    again = command(world, "label-push", *where)
    assert again.exit_code == 0, again.stderr
    sent = sorted(row["data"]["task_id"] for rows in Projects.kept.values() for row in rows)
    assert sent == sorted(task.task_id for task in world.tasks())
    step, how = mishap
    assert len(Projects.kept) == 2 + (how == "unanswered" and step in (1, 3)), "only an unanswered creation is repeated"
    assert set(json.loads(again.stdout).values()) == {number for number, rows in Projects.kept.items() if rows}
    assert command(world, "label-push", *where).exit_code == 2, "now it is there"


def test_what_is_missing_is_said_in_one_line(world: worlds.World, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLYWHEEL_LABEL_STUDIO_TOKEN", "wrong")
    said = command(world, "label-push", "--cycle", "2026-W40", "--url", server)
    assert (said.exit_code, said.stderr.count("\n")) == (2, 1)
    assert "2026-W40 has no export in a folder" in said.stderr
    other = command(world, "label-push", "--cycle", CYCLE, "--url", server, "--of", "side-by-side")
    assert (other.exit_code, "set side-by-side.folder" in other.stderr) == (2, True)
    assert command(world, "label-push", "--cycle", CYCLE, "--url", server).exit_code == 0
    refused = command(world, "label-pull", "--cycle", CYCLE, "--url", server, "--to", str(world.inbox))
    assert (refused.exit_code, "(401)" in refused.stderr) == (1, True)
