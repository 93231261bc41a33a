"""MLflow: one parent run per cycle, one child run per stage attempt, checkpoints as LoggedModels by reference.

Tracking describes work; it never decides it. A server that is down costs a warning and a pending record in the
store, which the next attempt sends. MLflow is imported late: it takes seconds, and most stages take less.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flywheel_tasks.core import schemas
from flywheel_tasks.core.config import without_password
from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.core.manifest import FileRecord, OutputRecord
from flywheel_tasks.core.storage import Storage
from flywheel_tasks.core.store import Artifact

EXPERIMENT = "character-flywheel"
_FIRST_SEND_SECONDS = 20.0
_SEND_EVERY_SECONDS = 10.0
_PENDING = "tracking/pending"
_SMALL_FILE = 4 << 20
_ILLEGAL = re.compile(r"[^\w .:/-]")


@dataclass
class AttemptRecord:
    """What tracking will say about one attempt; plain enough to wait in the store as JSON."""

    cycle: str
    stage: str
    attempt: str
    key: str
    uri: str
    commit: str
    params: dict[str, str]
    started: datetime.datetime
    status: str = "RUNNING"
    finished: datetime.datetime | None = None
    metrics: list[tuple[str, float, int, int]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    run_id: str | None = None
    page: str = ""
    sent_metrics: int = 0

    def metric(self, name: str, value: float, step: int | None) -> None:
        now = datetime.datetime.now(datetime.UTC)
        self.metrics.append((_ILLEGAL.sub("_", name)[:250], value, int(now.timestamp() * 1000), step or 0))

    def finish(self, artifact: Artifact | None) -> None:
        """Take over what the committed artifact says; None means another attempt was first."""
        self.status, self.finished = "FINISHED", datetime.datetime.now(datetime.UTC)
        if artifact is None:
            return
        record = artifact.manifest
        if record.rows:
            counts = {"rows.in": record.rows.rows_in, "rows.out": record.rows.rows_out}
            counts["rows.rejected"] = record.rows.rows_rejected
            counts |= {f"rejected.{reason}": count for reason, count in record.rows.reasons.items()}
            for name, count in counts.items():
                self.metric(name, count, None)
        lineage = {f"input.{name}": f"{made.stage}/{made.key}" for name, made in record.inputs.items()}
        lineage |= {"commit": record.commit, "code_version": record.code_version}
        for name, output in record.outputs.items():
            if output.contract in schemas.CHECKPOINTS:
                about = {"output": name, "uri": artifact.uri, "lineage": lineage}
                self.checkpoints += [about | part for part in _models(name, output)]
            elif output.contract in ("json", "file"):
                self.files += [f"{record.folder}/{f.path}" for f in output.files if f.bytes <= _SMALL_FILE]

    def to_json(self) -> bytes:
        return json.dumps(vars(self), default=str).encode()

    @classmethod
    def from_json(cls, data: bytes) -> AttemptRecord:
        body = json.loads(data)
        for name in ("started", "finished"):
            body[name] = body[name] and datetime.datetime.fromisoformat(body[name])
        return cls(**body)


class Tracker:
    """Sends attempt records to MLflow; long stages show up while they run."""

    def __init__(self, uri: str, storage: Storage) -> None:
        self._uri, self._storage = uri, storage
        self._lock = threading.Lock()

    @contextmanager
    def watch(self, record: AttemptRecord) -> Iterator[None]:
        """Track the attempt inside the block, whichever way it ends."""
        done = threading.Event()
        sender = threading.Thread(target=self._send_while_running, args=(record, done), daemon=True)
        sender.start()
        try:
            yield
        except BaseException:
            record.status, record.finished = "FAILED", datetime.datetime.now(datetime.UTC)
            raise
        finally:
            done.set()
            sender.join()
            self.send_or_keep(record)

    def send_or_keep(self, record: AttemptRecord) -> None:
        """Send the record and whatever is still waiting; on failure keep it in the store and say so."""
        try:
            with self._lock:
                self._send(record)
                self._finish_run(record)
        except Exception as error:
            reason = self._reason(error)
            kept = f"{_PENDING}/{record.stage}-{record.attempt}.json"
            print(
                f"warning: MLflow at {without_password(self._uri)} refused the record of {record.stage}: {reason}",
                file=sys.stderr,
            )
            try:
                self._storage.put(kept, record.to_json())
                print(f"warning: kept in the store as {kept}; the next run sends it", file=sys.stderr)
            except FlywheelError as second:
                print(f"warning: and the store did not take it either: {second}", file=sys.stderr)
        else:
            if record.page:
                print(f"{record.stage}: MLflow {record.page}", file=sys.stderr)
            self._send_pending()

    def _send_while_running(self, record: AttemptRecord, done: threading.Event) -> None:
        wait = _FIRST_SEND_SECONDS
        while not done.wait(wait):
            wait = _SEND_EVERY_SECONDS
            try:
                with self._lock:
                    self._send(record)
            except Exception as error:
                print(f"warning: MLflow is not reachable yet: {self._reason(error)}", file=sys.stderr)
                wait = 6 * _SEND_EVERY_SECONDS

    def _send_pending(self) -> None:
        """What earlier runs could not send. One record that cannot be sent does not keep the others."""
        for info in self._storage.list(_PENDING):
            path = self._storage.relative(info)
            try:
                data = self._storage.read(path) if path.endswith(".json") else None
                if data is not None:
                    with self._lock:
                        waiting = AttemptRecord.from_json(data)
                        self._send(waiting)
                        self._finish_run(waiting)
                    self._storage.delete(path)
            except FileNotFoundError:
                continue  # another run sent it at the same time
            except Exception as error:
                print(f"warning: {path} still waits for MLflow: {self._reason(error)}", file=sys.stderr)

    def _reason(self, error: Exception) -> str:
        text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        return text.replace(self._uri, without_password(self._uri))

    def _send(self, record: AttemptRecord) -> None:
        client = _client(self._uri)
        with _local_lock(self._uri):
            if record.run_id is None:
                record.run_id = self._start_run(client, record)
            self._log_metrics(client, record)

    def _start_run(self, client: Any, record: AttemptRecord) -> str:
        experiment = _experiment(client, self._uri)
        parent = self._parent_run(client, experiment, record.cycle)
        tags = {
            "mlflow.parentRunId": parent,
            "mlflow.runName": f"{record.stage} {record.cycle}",
            "mlflow.source.git.commit": record.commit,
            "stage": record.stage,
            "cycle": record.cycle,
            "attempt": record.attempt,
            "artifact_key": record.key,
            "artifact_uri": record.uri,
            "git_commit": record.commit,
        }
        run = client.create_run(experiment, start_time=_milliseconds(record.started), tags=tags)
        record.page = _page(self._uri, experiment, str(run.info.run_id))
        return str(run.info.run_id)

    def _log_metrics(self, client: Any, record: AttemptRecord) -> None:
        from mlflow.entities import Metric, Param

        fresh = record.metrics[record.sent_metrics :]
        params = [] if record.sent_metrics else [Param(key, value[:6000]) for key, value in record.params.items()]
        for start in range(0, max(len(fresh), 1), 900):
            batch = [Metric(name, value, at, step) for name, value, at, step in fresh[start : start + 900]]
            client.log_batch(record.run_id, metrics=batch, params=params if not start else [])
        record.sent_metrics += len(fresh)

    def _finish_run(self, record: AttemptRecord) -> None:
        """What is sent once, when the attempt is over."""
        client = _client(self._uri)
        with _local_lock(self._uri):
            if record.checkpoints:
                _log_checkpoints(self._uri, record)
            for path in record.files:
                data = self._storage.read(path)
                if data is not None:
                    _log_file(client, str(record.run_id), path, data)
            client.set_terminated(record.run_id, record.status, _milliseconds(record.finished or record.started))

    def _parent_run(self, client: Any, experiment: str, cycle: str) -> str:
        """The cycle's run. The store settles which one it is when several stages start at once."""
        from mlflow.exceptions import MlflowException

        target = hashlib.sha256(without_password(self._uri).encode()).hexdigest()[:12]
        path = f"tracking/{cycle}-{target}"
        known = self._storage.read(path)
        if known is not None:
            try:
                return str(client.get_run(known.decode()).info.run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        run = client.create_run(experiment, tags={"mlflow.runName": f"cycle {cycle}", "cycle": cycle, "kind": "cycle"})
        run_id = str(run.info.run_id)
        if known is not None:
            self._storage.put(path, run_id.encode())
        elif not self._storage.put_new(path, run_id.encode()):
            client.delete_run(run_id)
            return str((self._storage.read(path) or b"").decode())
        client.set_terminated(run_id)
        return run_id


def _page(uri: str, experiment: str, run_id: str) -> str:
    """Where a person sees the run: the server's own page, or that of the UI over a local database."""
    server = os.environ.get("FLYWHEEL_MLFLOW_UI") or (uri if uri.startswith("http") else "")
    return f"{without_password(server).rstrip('/')}/#/experiments/{experiment}/runs/{run_id}" if server else ""


def _client(uri: str) -> Any:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    from mlflow.tracking import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def _experiment(client: Any, uri: str) -> str:
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return str(found.experiment_id)
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlflow-files").as_uri()
    from mlflow.exceptions import MlflowException

    try:
        return str(client.create_experiment(EXPERIMENT, artifact_location=location))
    except MlflowException:
        found = client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            raise
        return str(found.experiment_id)


def _log_checkpoints(uri: str, record: AttemptRecord) -> None:
    """A LoggedModel holds where the weights are and their digest, never the weights."""
    import mlflow

    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(EXPERIMENT)
    for checkpoint in record.checkpoints:
        if "model_id" in checkpoint:
            continue  # sent before MLflow went away
        model = mlflow.create_external_model(
            name="-".join([record.stage, checkpoint["output"], record.cycle, *checkpoint["step"].split()]),
            source_run_id=record.run_id,
            model_type=record.stage,
            params={"artifact_key": record.key},
            tags={key: str(checkpoint[key]) for key in ("uri", "sha256", "bytes", "step")}
            | {"cycle": record.cycle}
            | checkpoint.get("lineage", {}),
        )
        checkpoint["model_id"] = model.model_id


def _log_file(client: Any, run_id: str, path: str, data: bytes) -> None:
    """Log artifacts/STAGE/KEY/ATTEMPT/OUTPUT/NAME under its name, folders included."""
    import tempfile

    folder, _, name = path.split("/", 5)[5].rpartition("/")
    with tempfile.TemporaryDirectory(prefix="flywheel-") as scratch:
        local = Path(scratch) / name
        local.write_bytes(data)
        client.log_artifact(run_id, str(local), folder or None)


def _models(name: str, output: OutputRecord) -> list[dict[str, Any]]:
    """Each model of an output: the one it is, or one for each step's folder."""
    groups: dict[str, list[FileRecord]] = {}
    for file in output.files:
        inside = file.path.partition(f"/{name}/")[2]
        groups.setdefault(inside.split("/")[0] if output.contract == "checkpoints" else "", []).append(file)
    records = {step: output.model_copy(update={"files": tuple(files)}) for step, files in groups.items()}
    return [
        {"step": step, "sha256": record.sha256, "bytes": sum(file.bytes for file in record.files)}
        for step, record in records.items()
    ]


@contextmanager
def _local_lock(uri: str) -> Iterator[None]:
    """Embedded SQLite: the first connection migrates the schema, and two at once would collide."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    import fcntl

    database = Path(uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    with open(database.with_suffix(".lock"), "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _milliseconds(moment: datetime.datetime) -> int:
    return int(moment.timestamp() * 1000)
