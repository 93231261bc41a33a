"""A Label Studio server, as far as annotation needs one: a project for each mode of an export, and people's answers."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from http.client import HTTPException
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from flywheel_tasks.annotation.label_studio import SERVER
from flywheel_tasks.annotation.publish import tasks
from flywheel_tasks.core.errors import ConfigError, FlywheelError
from flywheel_tasks.core.schemas import MODES


class Project(NamedTuple):
    """A server's project of one mode, and how many of its tasks the server is known to have."""

    number: int
    tasks: int = 0


Projects = dict[str, Project]
"""Mode → project."""


class Server:
    """Calls with an access token (Account & Settings → Legacy Token in Label Studio's own pages)."""

    def __init__(self, url: str, token: str, seconds: float = 120) -> None:
        if urlsplit(url).scheme not in ("http", "https"):
            raise ConfigError(f"Label Studio at '{url}': give an http(s):// address")
        self.url, self._token, self._seconds = url.rstrip("/"), token, seconds

    @property
    def name(self) -> str:
        """What tells its people from those of another server."""
        address = urlsplit(self.url)
        return (address.netloc.rpartition("@")[2] + address.path)[:80]

    def create_project(self, title: str, page: str, reviewers: int) -> int:
        body = {
            "title": title,
            "label_config": page,
            "maximum_annotations": reviewers,
            "show_skip_button": True,
            "enable_empty_annotation": False,
            "show_collab_predictions": False,
        }
        return self._number(self.call("POST", "/api/projects/", body), "id")

    def add_tasks(self, project: int, rows: list[dict[str, Any]]) -> int:
        return self._number(self.call("POST", f"/api/projects/{project}/import", rows), "task_count")

    def export(self, project: int) -> bytes:
        """Every task with its annotations, as a `.json` delivery holds them."""
        return json.dumps(self._tasks(project, "download_all_tasks=false"), ensure_ascii=False).encode()

    def task_ids(self, project: int) -> set[str]:
        """Our ids of the tasks that the project has."""
        return {str(row["data"].get("task_id")) for row in self._tasks(project, "download_all_tasks=true")}

    def _tasks(self, project: int, which: str) -> Any:
        return self.call("GET", f"/api/projects/{project}/export?exportType=JSON&{which}")

    def call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Token {self._token}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=self._seconds) as response:  # noqa: S310
                content = response.read()
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:500]
            raise FlywheelError(f"Label Studio refused {method} {path} ({error.code}): {said}") from error
        except (OSError, HTTPException) as error:
            raise FlywheelError(f"Label Studio at {self.url} does not answer: {error}: is it running?") from error
        try:
            return json.loads(content) if content else None
        except ValueError as error:
            raise self._odd(f"{method} {path} with what is no JSON") from error

    def _number(self, answer: Any, name: str) -> int:
        if not isinstance(answer, dict) or not isinstance(answer.get(name), int):
            raise self._odd(f"without '{name}'")
        return int(answer[name])

    def _odd(self, how: str) -> FlywheelError:
        return FlywheelError(
            f"{self.url} answered {how}: give Label Studio's own address (https if it redirects, no login page)"
        )


def push(
    server: Server, title: str, files: Mapping[str, bytes], known: Projects, remember: Callable[[Projects], None]
) -> Projects:
    """One project for each mode of an export folder's files, as far as `known` lacks it. `remember` is told after every
    step, so that the next attempt goes on where this one stops: a project is made once, and gets the tasks it lacks."""
    projects = dict(known)
    reviewers: dict[str, int] = {task.mode: task.reviewers for task in tasks(files["tasks.jsonl"])}
    for mode in (mode for mode in MODES if mode in reviewers):
        rows = [{"data": row["data"] | {SERVER: server.name}} for row in json.loads(files[f"label_studio/{mode}.json"])]
        there: set[str] = set()
        if mode in projects:
            if projects[mode].tasks == len(rows):
                continue
            there = server.task_ids(projects[mode].number)
        else:
            page = files[f"label_studio/{mode}.xml"].decode()
            projects[mode] = Project(server.create_project(f"{title} {mode}"[:50], page, reviewers[mode]))
            remember(projects)
        if missing := [row for row in rows if row["data"]["task_id"] not in there]:
            server.add_tasks(projects[mode].number, missing)
        projects[mode] = projects[mode]._replace(tasks=len(rows))
        remember(projects)
    return projects
