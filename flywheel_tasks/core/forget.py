"""Forget a user: purge their rows from every artifact, mark what learned from them, and prove it by reading all again.

The order makes a crash harmless: first nobody may ingest the user any more, then each artifact is switched from its
old files to purged ones by replacing its manifest, then the old files go. Running it again finishes what was left.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from flywheel_tasks.core import ids, lineage, schemas, tables
from flywheel_tasks.core.manifest import FileRecord, Forgotten, Manifest, OutputRecord
from flywheel_tasks.core.store import Artifact, Store

_ABANDONED_AFTER = datetime.timedelta(hours=24)


def forget(store: Store, user_id: str, secret: bytes) -> dict[str, Any]:
    """Purge `user_id`; the report says what was purged, what must retrain, and what a full re-read still found."""
    user, now = ids.pseudonym(user_id, secret), datetime.datetime.now(datetime.UTC)
    store.storage.put(f"forgotten/{user}.json", json.dumps({"at": now.isoformat()}).encode())
    purged: dict[str, int] = {}
    holders: list[lineage.Address] = []
    for artifact in store.artifacts():
        rows = _purge(store, artifact, user, user_id, now)
        if rows or any(entry.user == user for entry in artifact.manifest.forgotten):
            holders.append(lineage.address(artifact.manifest))
        if rows:
            purged["/".join(holders[-1])] = rows
    retrain = _mark_models(store, holders, user, now)
    strays = _remove_strays(store)
    removed, unfinished = _abandoned(store, now)
    left = {a.uri: rows for a in store.artifacts() if (rows := _remaining(a, user, user_id))}
    return {
        "user": user,
        "purged": purged,
        "retrain_needed": retrain,
        "stray_files_removed": strays,
        "abandoned_attempts_removed": removed,
        "unfinished_attempts": unfinished,
        "remaining": left,
        "clean": not left and not unfinished,
    }


def _purge(store: Store, artifact: Artifact, user: str, user_id: str, now: datetime.datetime) -> int:
    """Rewrite the files that hold the user's rows; returns how many rows went."""
    record, attempt = artifact.manifest, ids.new_attempt()
    outputs: dict[str, OutputRecord] = {}
    old: list[str] = []
    gone = 0
    for name, output in record.outputs.items():
        files = list(output.files)
        if output.contract in schemas.USER_COLUMNS:
            for index, file in enumerate(files):
                kept, rows = _without(artifact, output, file, user, user_id)
                if rows:
                    files[index] = _rewrite(store, record, attempt, name, output.contract, index, kept)
                    old.append(f"{record.folder}/{file.path}")
                    gone += rows
        outputs[name] = output.model_copy(update={"files": tuple(files)})
    if gone:
        entry = Forgotten(user=user, at=now, rows=gone)
        changed = record.model_copy(update={"outputs": outputs, "forgotten": (*record.forgotten, entry)})
        store.storage.put(record.path, changed.to_bytes())
        for path in old:
            store.storage.delete(path)
    return gone


def _without(
    artifact: Artifact, output: OutputRecord, file: FileRecord, user: str, user_id: str
) -> tuple[pa.Table, int]:
    path = f"{artifact.manifest.folder}/{file.path}"
    tables.verify(artifact.storage, artifact.manifest.folder, file)
    column = schemas.USER_COLUMNS[output.contract]
    with artifact.storage.open(path) as stream:
        found = int(
            pc.sum(
                _is_theirs(pq.read_table(stream, columns=_needed(output.contract, column)), column, user, user_id)
            ).as_py()
            or 0
        )
    if not found:
        return schemas.get(output.contract).empty_table(), 0
    with artifact.storage.open(path) as stream:
        table = pq.read_table(stream)
    return table.filter(pc.invert(_is_theirs(table, column, user, user_id))), found


def _needed(contract: str, column: str) -> list[str]:
    return [column, "raw"] if contract == "quarantine" else [column]


def _is_theirs(table: pa.Table, column: str, user: str, user_id: str) -> pa.ChunkedArray:
    """By pseudonym; a quarantined line too broken to have one is theirs if their id stands in it."""
    own = pc.fill_null(pc.equal(table[column], user), False)
    if "raw" in table.column_names:
        own = pc.or_(own, pc.fill_null(pc.match_substring(table["raw"], user_id), False))
    return own


def _rewrite(
    store: Store, record: Manifest, attempt: str, name: str, contract: str, index: int, kept: pa.Table
) -> FileRecord:
    spec = tables.PartSpec(store.uri, record.folder, attempt, name, contract)
    return tables.write_part(spec, index, [kept])


def _mark_models(store: Store, holders: list[lineage.Address], user: str, now: datetime.datetime) -> list[str]:
    """A model can't be purged: every checkpoint below a purged artifact is marked for retraining."""
    graph = lineage.Graph(store)
    below = {at for holder in holders for at in graph.downstream(holder)}
    marked = []
    for at in sorted(below):
        record = graph.manifests[at]
        if not any(output.contract == "checkpoint" for output in record.outputs.values()):
            continue
        marked.append("/".join(at))
        if not any(entry.user == user and entry.retrain_needed for entry in record.forgotten):
            entry = Forgotten(user=user, at=now, rows=0, retrain_needed=True)
            changed = record.model_copy(update={"forgotten": (*record.forgotten, entry)})
            store.storage.put(record.path, changed.to_bytes())
    return marked


def _abandoned(store: Store, now: datetime.datetime) -> tuple[list[str], list[str]]:
    """Files that no manifest names: left by a killed attempt (removed), or by one under way (reported)."""
    removed, unfinished = [], []
    for folder in _attempts(store):
        moments = [
            i.mtime for i in store.storage.list(folder, recursive=True) if i.type == pafs.FileType.File and i.mtime
        ]
        if moments and now - max(moments).astimezone(datetime.UTC) < _ABANDONED_AFTER:
            unfinished.append(folder)
        else:
            store.storage.delete_folder(folder)
            removed.append(folder)
    return removed, unfinished


def _remove_strays(store: Store) -> list[str]:
    """Files in the folders of committed artifacts that no manifest names: what a killed purge did not get to, or what
    an attempt that can only lose has written."""
    removed = []
    for artifact in store.artifacts():
        record = artifact.manifest
        named = {f"{record.folder}/{file.path}" for output in record.outputs.values() for file in output.files}
        for info in store.storage.list(record.folder, recursive=True):
            path = store.storage.relative(info)
            if info.type == pafs.FileType.File and path not in named and path != record.path:
                store.storage.delete(path)
                removed.append(path)
    return removed


def _attempts(store: Store) -> Iterator[str]:
    """Folders of attempts at artifacts that are not committed."""
    for stage in store.storage.list("artifacts"):
        for key in store.storage.list(f"artifacts/{stage.base_name}"):
            if store.find(stage.base_name, key.base_name) is None:
                for info in store.storage.list(store.storage.relative(key)):
                    if info.type == pafs.FileType.Directory:
                        yield store.storage.relative(info)


def _remaining(artifact: Artifact, user: str, user_id: str) -> int:
    count = 0
    for output in artifact.manifest.outputs.values():
        if output.contract in schemas.USER_COLUMNS:
            for file in output.files:
                count += _without(artifact, output, file, user, user_id)[1]
    return count
