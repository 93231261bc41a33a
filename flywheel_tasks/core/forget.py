"""Forget a user: purge their rows from every artifact, mark what learned from them, and prove it by reading all again.

The order makes a crash harmless: first nobody may ingest the user any more, then each artifact is switched from its
old files to purged ones by replacing its manifest, then the old files go. Running it again finishes what was left.

It also makes the proof whole: who runs is asked after the first step and before the artifacts are read. An attempt that
does not know of the user was under way then, and is reported; or it had ended, and what it committed is read.
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

from flywheel_tasks.core import ids, lease, lineage, manifest, partial, schemas, tables
from flywheel_tasks.core.errors import ConfigError, FlywheelError, InputError
from flywheel_tasks.core.manifest import FileRecord, Forgotten, Manifest, OutputRecord, artifact_folder
from flywheel_tasks.core.store import ATTEMPTS, Artifact, Store

_ABANDONED_AFTER = datetime.timedelta(hours=24)
_LOCK = "forget.lock"


def forget(store: Store, user_id: str, secret: bytes) -> dict[str, Any]:
    """Purge `user_id`; the report says what was purged, what must retrain, and what a full re-read still found."""
    if not user_id.strip():
        raise InputError("the user id is empty: give the id as it stands in the raw logs")
    user, now = ids.pseudonym(user_id, secret), datetime.datetime.now(datetime.UTC)
    check_key(store, secret)
    with lease.held(store.storage, _LOCK) as alone:
        return _forget(store, user, now, alone)


def _forget(store: Store, user: str, now: datetime.datetime, alone: lease.Lease) -> dict[str, Any]:
    store.storage.put(f"forgotten/{user}.json", json.dumps({"at": now.isoformat()}).encode())
    ignorant = {name for name, says in _under_way(store).items() if user not in says["knows"]}
    purged: dict[str, int] = {}
    holders: list[lineage.Address] = []
    for artifact in store.artifacts():
        rows = _purge(store, artifact, user, now)
        if rows or any(entry.user == user for entry in artifact.manifest.forgotten):
            holders.append(lineage.address(artifact.manifest))
        if rows:
            purged["/".join(holders[-1])] = rows
    retrain = _mark_models(store, holders, user, now)
    partial.clear_outdated(store.storage)
    strays = _remove_strays(store, alone)
    removed, unfinished = _abandoned(store, now)
    unfinished = sorted(ignorant | set(unfinished))
    left = {a.uri: rows for a in store.artifacts() if (rows := _remaining(a, user))}
    return {
        "user": user,
        "known": bool(holders),
        "purged": purged,
        "retrain_needed": retrain,
        "stray_files_removed": strays,
        "abandoned_attempts_removed": removed,
        "unfinished_attempts": unfinished,
        "remaining": left,
        "clean": not left and not unfinished,
    }


def check_key(store: Store, secret: bytes) -> None:
    """Under another key nobody would be found, and that would read as a proof."""
    for artifact in store.artifacts():
        other = artifact.manifest.environment.get("user_key")
        if other not in (None, ids.fingerprint(secret)):
            raise ConfigError(
                f"{artifact.manifest.folder} was pseudonymised under another {ids.USER_KEY_VARIABLE}: set the key that "
                "made this store, or nobody in it can be found"
            )


def _under_way(store: Store) -> dict[str, dict[str, Any]]:
    """The folder of every attempt that gives a sign of life, and what it says. Signs of the dead are removed."""
    found = {}
    for info in store.storage.list(ATTEMPTS):
        path = store.storage.relative(info)
        if not ids.is_legal(ids.relative_path, path, ATTEMPTS):
            continue  # what a file system left there is no sign
        data = store.storage.read(path)
        if says := lease.read(data):
            found[f"{artifact_folder(says['stage'], says['key'])}/{says['attempt']}"] = says
        elif data is not None:
            store.storage.delete(path)
    return found


def _purge(store: Store, artifact: Artifact, user: str, now: datetime.datetime) -> int:
    """Rewrite the files that hold the user's rows; returns how many rows went."""
    record, attempt = artifact.manifest, ids.new_attempt()
    outputs: dict[str, OutputRecord] = {}
    gone = 0
    for name, output in record.outputs.items():
        files = list(output.files)
        if output.contract in schemas.USER_COLUMNS:
            for index, file in enumerate(files):
                if rows := _rows_of(artifact, output, file, user):
                    spec = tables.PartSpec(store.uri, record.folder, attempt, name, output.contract)
                    files[index] = _rewrite(artifact, spec, index, file, user)
                    gone += rows
        outputs[name] = output.model_copy(update={"files": tuple(files)})
    if gone:
        for name, output in record.outputs.items():
            if output.contract == schemas.DERIVED:
                outputs[name] = output.model_copy(update={"files": ()})
        entry = Forgotten(user=user, at=now, rows=gone)
        changed = record.model_copy(update={"outputs": outputs, "forgotten": (*record.forgotten, entry)})
        _switch(store, record, changed)
        for path in sorted(record.paths - changed.paths):
            store.storage.delete(path)
    return gone


def _switch(store: Store, before: Manifest, after: Manifest) -> None:
    """Replace a manifest by what was made of it, unless it is another one by now.

    A purge that was taken for dead can wake up and remove the new files as strays: then the old manifest stands again.
    """
    data = store.storage.read(before.path) or b""
    same = bool(data) and manifest.parse(data, before.path) == before
    if not same or not store.storage.replace(before.path, data, after.to_bytes()):
        raise FlywheelError(f"{before.path} was changed by another forget meanwhile: run it again")
    if lost := set(store.missing(after)) - before.paths:
        store.storage.replace(before.path, after.to_bytes(), data)
        raise FlywheelError(f"{min(lost)} was removed by another forget meanwhile: run it again")


def _rows_of(artifact: Artifact, output: OutputRecord, file: FileRecord, user: str) -> int:
    """How many rows of the file are the user's. Here as in `_rewrite` a batch is held at a time, never the file."""
    tables.verify(artifact.storage, artifact.manifest.folder, file)
    path, column = f"{artifact.manifest.folder}/{file.path}", schemas.USER_COLUMNS[output.contract]
    with artifact.storage.open(path) as stream:
        batches = pq.ParquetFile(stream).iter_batches(columns=[column])
        return sum(int(pc.sum(_is(batch.column(0), user)).as_py() or 0) for batch in batches)


def _rewrite(artifact: Artifact, spec: tables.PartSpec, index: int, file: FileRecord, user: str) -> FileRecord:
    """The file again, with the rows of everybody else."""
    column = schemas.USER_COLUMNS[spec.contract]
    with artifact.storage.open(f"{artifact.manifest.folder}/{file.path}") as stream:
        whole = (pa.Table.from_batches([batch]) for batch in pq.ParquetFile(stream).iter_batches())
        return tables.write_part(spec, index, (part.filter(pc.invert(_is(part[column], user))) for part in whole))


def _is(users: pa.Array | pa.ChunkedArray, user: str) -> pa.Array | pa.ChunkedArray:
    return pc.fill_null(pc.equal(users, user), False)


def _mark_models(store: Store, holders: list[lineage.Address], user: str, now: datetime.datetime) -> list[str]:
    """A model can't be purged: every checkpoint below a purged artifact is marked for retraining."""
    graph = lineage.Graph(store.artifacts())
    below = {at for holder in holders for at in graph.downstream(holder)}
    marked = []
    for at in sorted(below):
        record = graph.manifests[at]
        if not any(output.contract in schemas.CHECKPOINTS for output in record.outputs.values()):
            continue
        marked.append("/".join(at))
        if not any(entry.user == user and entry.retrain_needed for entry in record.forgotten):
            entry = Forgotten(user=user, at=now, rows=0, retrain_needed=True)
            _switch(store, record, record.model_copy(update={"forgotten": (*record.forgotten, entry)}))
    return marked


def _abandoned(store: Store, now: datetime.datetime) -> tuple[list[str], list[str]]:
    """Files that no manifest names and no sign of life covers: left by a killed attempt (removed), or by one whose
    workers may still write (reported)."""
    removed, unfinished = [], []
    under_way = _under_way(
        store
    )  # before the folders: an attempt that has ended since is committed when they are listed
    for folder in _attempts(store):
        if folder in under_way:
            continue
        moments = [
            i.mtime for i in store.storage.list(folder, recursive=True) if i.type == pafs.FileType.File and i.mtime
        ]
        if moments and now - max(moments).astimezone(datetime.UTC) < _ABANDONED_AFTER:
            unfinished.append(folder)
        else:
            store.storage.delete_folder(folder)
            removed.append(folder)
    return removed, unfinished


def _remove_strays(store: Store, alone: lease.Lease) -> list[str]:
    """Files in the folders of committed artifacts that no manifest names: what a killed purge did not get to, or what
    an attempt that can only lose has written."""
    removed = []
    for artifact in store.artifacts():
        record = artifact.manifest
        found = store.storage.list(record.folder, recursive=True)
        files = {store.storage.relative(info) for info in found if info.type == pafs.FileType.File}
        ours = {path for path in files if ids.is_legal(ids.relative_path, path, "")}  # not what a file system leaves
        strays = sorted(ours - record.paths - {record.path})
        if strays:
            alone.check()  # to another purge they may be files that its next manifest names
        for path in strays:
            store.storage.delete(path)
        removed += strays
    return removed


def _attempts(store: Store) -> Iterator[str]:
    """Folders of attempts at artifacts that are not committed."""
    for stage, key in store.folders():
        if store.find(stage, key) is None:
            for info in store.storage.list(artifact_folder(stage, key)):
                if info.type == pafs.FileType.Directory:
                    yield store.storage.relative(info)


def _remaining(artifact: Artifact, user: str) -> int:
    count = 0
    for output in artifact.manifest.outputs.values():
        if output.contract in schemas.USER_COLUMNS:
            for file in output.files:
                count += _rows_of(artifact, output, file, user)
    return count
