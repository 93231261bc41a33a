"""An export folder: written whole or not taken for whole, and read back only when every byte is as written.

The files go first, `export.json` with their digests last and only if absent: without it a folder is an interrupted
export, and the next attempt, which writes the same bytes, completes it. It works the same on a disk and in a bucket.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from flywheel_tasks.annotation.contract import Task
from flywheel_tasks.core import problems
from flywheel_tasks.core.errors import CorruptArtifact, InputError
from flywheel_tasks.core.storage import Storage

FORMAT = "flywheel.export/1"
_SEAL = "export.json"


def seal(cycle: str, files: Mapping[str, bytes]) -> tuple[str, bytes]:
    """The name of an export and its `export.json`: both follow from the content."""
    listed = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in sorted(files.items())
    }
    tasks = files["tasks.jsonl"].count(b"\n")
    body = {"contract": FORMAT, "cycle": cycle, "tasks": tasks, "files": listed}
    data = json.dumps(body, indent=1, sort_keys=True).encode() + b"\n"
    return f"{cycle}-{hashlib.sha256(data).hexdigest()[:12]}", data


def publish(folder: str, cycle: str, files: Mapping[str, bytes]) -> str:
    """Write an export below `folder` (a path or URI) and return its name; doing it again changes nothing."""
    name, sealed = seal(cycle, files)
    storage = Storage(folder)
    for file, data in files.items():
        storage.put(f"{name}/{file}", data)
    if not storage.put_new(f"{name}/{_SEAL}", sealed) and storage.read(f"{name}/{_SEAL}") != sealed:
        raise CorruptArtifact(f"{folder}/{name}/{_SEAL} is damaged: delete the folder and export again")
    return name


def read(folder: str, name: str) -> dict[str, bytes]:
    """The files of a whole export; an interrupted or altered one is refused."""
    storage, where = Storage(folder), f"{folder}/{name}"
    sealed = storage.read(f"{name}/{_SEAL}")
    if sealed is None:
        raise InputError(f"{where} has no {_SEAL}: the export was interrupted; run annotate-export again")
    try:
        listed: dict[str, Any] = json.loads(sealed)["files"]
        expected = {str(file): str(about["sha256"]) for file, about in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptArtifact(f"{where}/{_SEAL} is damaged: delete the folder and export again") from error
    files = {}
    for file, sha256 in expected.items():
        data = storage.read(f"{name}/{file}")
        if data is None or hashlib.sha256(data).hexdigest() != sha256:
            raise CorruptArtifact(f"{where}/{file} is missing or altered: delete the folder and export again")
        files[file] = data
    return files


def tasks(data: bytes) -> list[Task]:
    """The tasks of a `tasks.jsonl`."""
    found = []
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            found.append(Task.model_validate_json(line))
        except ValidationError as error:
            where, what = problems.first(error, Task)
            raise InputError(f"tasks.jsonl:{number}: {where or 'the line'}: {what}: export again") from error
    return found


def task_lines(found: list[Task]) -> bytes:
    """Tasks as JSON Lines."""
    return "".join(task.model_dump_json() + "\n" for task in found).encode("utf-8")
