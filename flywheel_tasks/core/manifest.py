"""The manifest: the one small object whose existence is the commit of an artifact (design, section 3)."""

from __future__ import annotations

import datetime
import hashlib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from flywheel_tasks.core import ids
from flywheel_tasks.core.errors import CorruptArtifact, InputError


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class FileRecord(_Record):
    """One committed file; `path` is relative to the artifact's folder."""

    path: str
    bytes: int = Field(ge=0)
    rows: int | None = None
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        return ids.relative_path(path, "manifest")


class OutputRecord(_Record):
    """One named output of a stage: a table of a known schema, a checkpoint, JSON or a loose file."""

    contract: str
    version: int
    files: tuple[FileRecord, ...]

    @property
    def rows(self) -> int:
        return sum(file.rows or 0 for file in self.files)

    @property
    def sha256(self) -> str:
        """One digest over the output's files, in order."""
        return _digest_files(self.files)


class InputRecord(_Record):
    stage: str
    key: str
    output: str


class SourceRecord(_Record):
    """A file from outside the store that the stage read."""

    name: str
    uri: str
    bytes: int
    sha256: str


class Rows(_Record):
    """Row accounting: nothing is lost without a reason."""

    unit: str
    rows_in: int = Field(ge=0)
    rows_out: int = Field(ge=0)
    rows_rejected: int = Field(ge=0)
    reasons: dict[str, int] = {}

    @model_validator(mode="after")
    def _adds_up(self) -> Rows:
        if self.rows_in != self.rows_out + self.rows_rejected:
            raise ValueError(
                f"{self.rows_in} {self.unit} rows in, but {self.rows_out} out + {self.rows_rejected} rejected"
            )
        if sum(self.reasons.values()) != self.rows_rejected:
            raise ValueError(f"{self.rows_rejected} rejected rows, but reasons for {sum(self.reasons.values())}")
        return self


class Forgotten(_Record):
    """A purge after the commit: whose words left, when, and how many rows (or, for a model, that it must retrain)."""

    user: str
    at: datetime.datetime
    rows: int
    retrain_needed: bool = False


class Manifest(_Record):
    format: Literal["flywheel.manifest/1"] = "flywheel.manifest/1"
    stage: str
    key: str
    cycle: str
    attempt: str
    inputs: dict[str, InputRecord]
    sources: tuple[SourceRecord, ...]
    outputs: dict[str, OutputRecord]
    rows: Rows | None
    config: dict[str, Any]
    code_version: str
    commit: str
    environment: dict[str, str]
    started: datetime.datetime
    finished: datetime.datetime
    metrics: dict[str, float]
    forgotten: tuple[Forgotten, ...] = ()

    @field_validator("stage", "attempt")
    @classmethod
    def _plain(cls, value: str) -> str:
        return ids.name(value, "name")

    @field_validator("key")
    @classmethod
    def _key(cls, value: str) -> str:
        return ids.key(value)

    @property
    def folder(self) -> str:
        return artifact_folder(self.stage, self.key)

    @property
    def path(self) -> str:
        return f"{self.folder}/manifest.json"

    @property
    def paths(self) -> frozenset[str]:
        """Paths within the store of all its files."""
        return frozenset(f"{self.folder}/{file.path}" for output in self.outputs.values() for file in output.files)

    @property
    def digest(self) -> str:
        """What the artifact holds, whichever attempt wrote it: equal content, equal digest."""
        content = "".join(f"{name}:{output.sha256}\n" for name, output in sorted(self.outputs.items()))
        return hashlib.sha256(content.encode()).hexdigest()

    def to_bytes(self) -> bytes:
        body = self.model_dump_json(indent=1)
        return f'{{\n "checksum": "{_checksum(body)}",\n "manifest": {body}\n}}\n'.encode()


def parse(data: bytes, where: str) -> Manifest:
    """The manifest in `data`; a byte that changed since the commit is an error."""
    try:
        text = data.decode()
        head, begins, body = text.partition('\n "manifest": ')
        if not begins:
            raise ValueError("it is cut off or no manifest")
        body = body.removesuffix("\n}\n")
        if head != f'{{\n "checksum": "{_checksum(body)}",':
            raise ValueError("its checksum does not match its content")
        return Manifest.model_validate_json(body)
    except (ValueError, ValidationError, InputError) as error:
        reason = str(error).splitlines()[0]
        raise CorruptArtifact(
            f"{where} is damaged ({reason}): restore it, or delete its folder and run again"
        ) from error


def artifact_folder(stage: str, key: str) -> str:
    return f"artifacts/{ids.name(stage, 'stage')}/{ids.key(key)}"


def _checksum(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def _digest_files(files: tuple[FileRecord, ...]) -> str:
    """Attempts write under their own prefix, so the first folder of a path says who wrote it, not what it is."""
    lines = "".join(f"{file.path.split('/', 1)[1]} {file.bytes} {file.sha256}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()
