"""`flywheel label-push` and `label-pull`: an export onto a Label Studio server, and its answers back (Sec. 2.2.2).

A folder remembers beside the export which projects a server has of it, so nothing is put there twice, and the answers
are fetched without anybody writing down a number.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flywheel_tasks.core.commands import Settings, configured
from flywheel_tasks.core.config import FlywheelConfig
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.storage import Storage
from flywheel_tasks.core.store import Store

if TYPE_CHECKING:
    from flywheel_tasks.annotation.label_studio_server import Projects

TOKEN = "FLYWHEEL_LABEL_STUDIO_TOKEN"  # noqa: S105 - the name of a variable
Url = Annotated[str, typer.Option("--url", help=f"The server's address; its access token is read from ${TOKEN}.")]
Cycle = Annotated[str, typer.Option("--cycle", help="The cycle whose export is meant.")]
Sender = Literal["annotate-export", "side-by-side"]
Of = Annotated[Sender, typer.Option("--of", help="Whose export: the week's pairs, or candidate against champion.")]


def register(app: typer.Typer, settings: Settings) -> None:
    """Add the commands; `settings` builds the configuration from profile, file and overrides."""
    over = configured(settings, "Whose store.")

    @app.command("label-push")
    @over
    def label_push(
        config: FlywheelConfig,
        cycle: Cycle,
        url: Url,
        of: Of = "annotate-export",
    ) -> None:
        """Make a Label Studio project for each mode of the export, once for each server, and give it the tasks that it
        lacks; prints their numbers. After a failure, run it again: it goes on where it stopped."""
        from flywheel_tasks.annotation import label_studio_server, publish

        folder, name = _export(config, cycle, of)
        server = label_studio_server.Server(url, _token())
        storage, note = Storage(folder), _note(name, server.name)
        known, made = _projects(storage, note), list[str]()

        def remember(projects: Projects) -> None:
            storage.put(note, json.dumps(projects).encode())
            made.append(note)

        projects = label_studio_server.push(server, name, publish.read(folder, name), known, remember)
        numbers = json.dumps({mode: project.number for mode, project in projects.items()})
        if not made:
            raise InputError(f"{server.url} has {name} already: projects {numbers}")
        print(numbers)

    @app.command("label-pull")
    @over
    def label_pull(
        config: FlywheelConfig,
        cycle: Cycle,
        url: Url,
        to: Annotated[str, typer.Option("--to", help="Folder or URI of the deliveries that the import reads.")],
        of: Of = "annotate-export",
    ) -> None:
        """Write the answers so far as deliveries of today's batch, one for each server and mode, as often as you like:
        what was read before is known; prints their names."""
        from flywheel_tasks.annotation import label_studio_server

        folder, name = _export(config, cycle, of)
        server = label_studio_server.Server(url, _token())
        known = _projects(Storage(folder), _note(name, server.name))
        if not known:
            raise InputError(f"{server.url} has no project of {name}: run label-push first")
        for mode, project in known.items():
            file = f"{datetime.now(UTC):%y%m%d}-{mode}-{name}-{_plain(server.name)}.json"
            Storage(to).put(file, server.export(project.number))
            print(file)


def _export(config: FlywheelConfig, cycle: str, sender: Sender) -> tuple[str, str]:
    """Where the cycle's export lies, and its name."""
    folder: str = config.stages[sender].folder  # type: ignore[attr-defined]
    found = Store(config.store.uri).pointed(cycle, sender)
    if found is None or not folder:
        raise InputError(
            f"{cycle} has no export in a folder: set {sender}.folder and run `flywheel run {sender} --cycle {cycle}`"
        )
    return folder, str(found.json("report")["export"])


def _note(export: str, server: str) -> str:
    return f"{export}/projects-{_plain(server)}.json"


def _plain(server: str) -> str:
    """A server's name as part of a file's."""
    return server.replace(":", "_").replace("/", "_")


def _projects(storage: Storage, note: str) -> Projects:
    """What the folder remembers of the server; nothing before the first push."""
    from flywheel_tasks.annotation.label_studio_server import Project

    known = json.loads(storage.read(note) or b"{}")
    return {mode: Project(*project) for mode, project in known.items()}


def _token() -> str:
    token = os.environ.get(TOKEN, "")
    if not token:
        raise InputError(f"${TOKEN} is not set: copy the token from Account & Settings in Label Studio")
    return token
