"""The store: content-addressed artifacts, attempt-fenced writes, one-object commits (design, section 3).

artifacts/<stage>/<key>/manifest.json          the commit: exists exactly when the artifact does
artifacts/<stage>/<key>/<attempt>/<output>/…   files, invisible until a manifest names them
cycles/<cycle>/<stage>.json                    which artifact a cycle's stage gave
forgotten/<pseudonym>.json                     who must never be ingested again
attempts/<attempt>.json                        a sign of life of an attempt under way: `forget` waits for it
sources/<digest of a URI>                      size, time and sha256 of a raw log, so it is hashed once
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from flywheel_tasks.core import ids, manifest, schemas, tables
from flywheel_tasks.core.errors import CorruptArtifact, FlywheelError, InputError
from flywheel_tasks.core.manifest import InputRecord, Manifest, SourceRecord
from flywheel_tasks.core.storage import Storage, digest_stream, open_external

KEY_DIGITS = 32
ATTEMPTS = "attempts"


def artifact_key(
    stage: str,
    contracts: Mapping[str, str],
    code_version: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, InputRecord],
    sources: Mapping[str, tuple[SourceRecord, ...]],
    context: Mapping[str, str],
) -> str:
    """The digest of all that decides an artifact's content; the same work has the same key on any machine."""
    identity = {
        "stage": stage,
        "contracts": {name: schemas.fingerprint(contract) for name, contract in contracts.items()},
        "code": code_version,
        "config": config,
        "inputs": {name: [record.stage, record.key, record.output] for name, record in inputs.items()},
        "sources": {field: [[source.name, source.sha256] for source in found] for field, found in sources.items()},
        "context": dict(context),
    }
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]


def forgotten_users(storage: Storage) -> frozenset[str]:
    """Pseudonyms of all who asked to be forgotten."""
    names = (info.base_name for info in storage.list("forgotten"))
    return frozenset(name.removesuffix(".json") for name in names if name.endswith(".json"))


class Artifact:
    """A committed artifact: its manifest and verified access to its files."""

    def __init__(self, storage: Storage, record: Manifest) -> None:
        self.storage, self.manifest = storage, record

    @property
    def uri(self) -> str:
        return f"{self.storage.uri}/{self.manifest.path}"

    def table(self, output: str) -> tables.TableReader:
        return tables.TableReader(self.storage, self.manifest.folder, self._output(output))

    def json(self, output: str) -> Any:
        return json.loads(self.file(output))

    def file(self, output: str, name: str | None = None) -> bytes:
        """The verified bytes of an output's only file, or of the file called `name`."""
        files = [f for f in self._output(output).files if name is None or f.path.endswith(f"/{output}/{name}")]
        if len(files) != 1:
            raise InputError(f"{self.uri}: output '{output}' has {len(files)} files called '{name}': expected one")
        tables.verify(self.storage, self.manifest.folder, files[0])
        data = self.storage.read(f"{self.manifest.folder}/{files[0].path}")
        if data is None:
            raise CorruptArtifact(f"{self.manifest.folder}/{files[0].path} is missing: run the stage again")
        return data

    def verify(self) -> int:
        """Check every file of the artifact; returns how many there are."""
        files = [file for output in self.manifest.outputs.values() for file in output.files]
        for file in files:
            tables.verify(self.storage, self.manifest.folder, file)
        return len(files)

    def _output(self, name: str) -> manifest.OutputRecord:
        if name not in self.manifest.outputs:
            raise InputError(f"{self.uri} has no output '{name}': it has {', '.join(self.manifest.outputs)}")
        return self.manifest.outputs[name]


class Store:
    def __init__(self, uri: str) -> None:
        self.storage = Storage(uri)
        self.uri = self.storage.uri

    def uri_of(self, stage: str, key: str) -> str:
        """Where the manifest of that artifact is, or will be."""
        return f"{self.uri}/{manifest.artifact_folder(stage, key)}/manifest.json"

    def find(self, stage: str, key: str) -> Artifact | None:
        path = f"{manifest.artifact_folder(stage, key)}/manifest.json"
        data = self.storage.read(path)
        if data is None:
            return None
        record = manifest.parse(data, path)
        if (record.stage, record.key) != (stage, key):
            raise CorruptArtifact(f"{path} describes {record.stage}/{record.key}: the folder was moved; move it back")
        return Artifact(self.storage, record)

    def get(self, stage: str, key: str) -> Artifact:
        artifact = self.find(stage, key)
        if artifact is None:
            raise InputError(f"no artifact {stage}/{key} in {self.uri}: run `flywheel status` to see what there is")
        return artifact

    def by_uri(self, uri: str) -> Artifact:
        """The artifact whose manifest has this URI; only manifests of this store are accepted."""
        parts = uri.removeprefix(self.uri + "/").split("/")
        if (
            not uri.startswith(self.uri + "/")
            or len(parts) != 4
            or (parts[0], parts[3]) != ("artifacts", "manifest.json")
        ):
            raise InputError(
                f"'{uri[:200]}' is not a manifest of this store: expected {self.uri}/artifacts/STAGE/KEY/manifest.json"
            )
        return self.get(ids.name(parts[1], "stage"), ids.key(parts[2]))

    def resolve(self, reference: str) -> Artifact:
        """An artifact by manifest URI, by STAGE/KEY, or by an unambiguous beginning of its key."""
        if "://" in reference:
            return self.by_uri(reference)
        stage, _, prefix = reference.rpartition("/")
        ids.name(prefix, "artifact")
        if stage:
            ids.name(stage, "stage")
        # Only those that match are read: a damaged manifest must not hide the others.
        named = [at for at in self.folders() if stage in ("", at[0]) and at[1].startswith(prefix)]
        found = [artifact for at in named if (artifact := self.find(*at))]
        if len(found) != 1:
            problem = "no artifact matches" if not found else f"{len(found)} artifacts match"
            raise InputError(f"{problem} '{reference}': give STAGE/KEY or a manifest URI (see `flywheel status`)")
        return found[0]

    def commit(self, record: Manifest) -> tuple[Artifact, bool]:
        """Publish the artifact, or find that another attempt was first: then this attempt's files are removed."""
        data = record.to_bytes()
        manifest.parse(data, record.path)
        if (gone := self.missing(record)) and self.find(record.stage, record.key) is None:
            raise FlywheelError(f"store: {gone[0]} was removed after it was written: run {record.stage} again")
        if self.storage.put_new(record.path, data):
            return Artifact(self.storage, record), True
        winner = self.get(record.stage, record.key)
        won = winner.manifest.attempt == record.attempt  # an answer that got lost on the way, and the retry after it
        if not won:
            self.discard(record.stage, record.key, record.attempt)
        return winner, won

    def missing(self, record: Manifest) -> list[str]:
        """Files that the manifest names and the store does not have."""
        attempts = {"/".join(path.split("/")[:4]) for path in record.paths}
        there = {self.storage.relative(i) for folder in attempts for i in self.storage.list(folder, recursive=True)}
        return sorted(record.paths - there)

    def discard(self, stage: str, key: str, attempt: str) -> None:
        """Remove an attempt's files; a worker on its way out may add one while they go."""
        folder = f"{manifest.artifact_folder(stage, key)}/{ids.name(attempt, 'attempt')}"
        for _ in range(4):
            with suppress(FlywheelError, FileNotFoundError):
                return self.storage.delete_folder(folder)
            time.sleep(0.25)
        return self.storage.delete_folder(folder)

    def point(self, cycle: str, record: Manifest) -> None:
        """Record that this cycle's stage gave this artifact."""
        pointer = {"stage": record.stage, "key": record.key}
        self.storage.put(self._pointer_path(cycle, record.stage), json.dumps(pointer).encode())

    def pointed(self, cycle: str, stage: str) -> Artifact | None:
        """The artifact that this cycle's stage gave, if it ran."""
        path = self._pointer_path(cycle, stage)
        data = self.storage.read(path)
        if data is None:
            return None
        try:
            key = ids.key(str(json.loads(data)["key"]))
        except (ValueError, KeyError, TypeError, InputError) as error:
            raise CorruptArtifact(f"{path} is damaged: delete it and run the stage again") from error
        return self.find(stage, key)

    def cycles(self) -> list[str]:
        return [i.base_name for i in self.storage.list("cycles") if ids.is_legal(ids.cycle_id, i.base_name)]

    def artifacts(self) -> Iterator[Artifact]:
        """Every committed artifact, in order of stage and key."""
        for stage, key in self.folders():
            artifact = self.find(stage, key)
            if artifact is not None:
                yield artifact

    def folders(self) -> Iterator[tuple[str, str]]:
        """Stage and key of every folder that can hold an artifact; what a file manager left beside them is skipped."""
        for stage in self.storage.list("artifacts"):
            if ids.is_legal(ids.name, stage.base_name, "stage"):
                for folder in self.storage.list(f"artifacts/{stage.base_name}"):
                    if ids.is_legal(ids.key, folder.base_name):
                        yield stage.base_name, folder.base_name

    def forgotten(self) -> frozenset[str]:
        """Pseudonyms that must not enter any artifact."""
        return forgotten_users(self.storage)

    def source(self, uri: str, name: str, size: int, mtime_ns: int) -> SourceRecord:
        """Size and sha256 of an outside file, hashed once for each (uri, size, modification time)."""
        memo = f"sources/{hashlib.sha256(uri.encode()).hexdigest()[:KEY_DIGITS]}"
        known = self.storage.read(memo)
        if known is not None:
            remembered, _, sha256 = known.decode(errors="replace").partition(" ")
            if remembered == f"{size}/{mtime_ns}" and len(sha256) == 64:
                return SourceRecord(name=name, uri=uri, bytes=size, sha256=sha256)
        with open_external(uri) as stream:
            read, sha256 = digest_stream(stream)
        if read != size:
            raise InputError(f"{uri} changed while it was read: wait until the log is complete, then run again")
        self.storage.put(memo, f"{size}/{mtime_ns} {sha256}".encode())
        return SourceRecord(name=name, uri=uri, bytes=size, sha256=sha256)

    def _pointer_path(self, cycle: str, stage: str) -> str:
        return f"cycles/{ids.cycle_id(cycle)}/{ids.name(stage, 'stage')}.json"
