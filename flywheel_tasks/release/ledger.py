"""Who is champion and candidate, and why: an append-only ledger in the store (Sec. 2.5.2, 2.6).

champion/ledger/000001.json …    one entry a change, created only if absent; each names the digest of the one before

The ledger is the truth and registry aliases follow it. Two writers at once want the same number: one gets it, and the
other looks again at what is now true before it decides whether there is anything left to do.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime
from typing import Literal, NamedTuple

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator

from flywheel_tasks.core import ids
from flywheel_tasks.core.errors import CorruptArtifact, FlywheelError, InputError
from flywheel_tasks.core.storage import Storage

FOLDER = "champion/ledger"
_FILE = re.compile(r"(\d{6})\.json\Z")
_TRIES = 64

Action = Literal["nominate", "refuse", "crown", "rollback"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Model(_Record):
    """A checkpoint of the store."""

    stage: str
    key: str
    output: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @field_validator("stage", "output")
    @classmethod
    def _plain(cls, value: str) -> str:
        return ids.name(value, "name")

    @field_validator("key")
    @classmethod
    def _key(cls, value: str) -> str:
        return ids.key(value)

    def __str__(self) -> str:
        return f"{self.stage}/{self.key}"

    def path(self, store_uri: str) -> str:
        """What a config names this model by."""
        return f"{store_uri}/artifacts/{self.stage}/{self.key}/{self.output}"


def title(model: Model | None) -> str:
    """What a page calls a champion."""
    return str(model or "the base policy")


class Entry(_Record):
    """One change, or one refusal to change. `model` None is the base policy of the configuration."""

    number: int = Field(ge=1)
    action: Action
    model: Model | None
    cycle: str
    by: str = Field(min_length=1, max_length=200)
    why: str = Field(max_length=4000)
    at: AwareDatetime
    because: str = Field(description="the artifact that this rests on: a gate's decision or a readout")
    before: str = Field(description="sha256 of the entry before; empty for the first")

    @field_validator("cycle")
    @classmethod
    def _cycle(cls, value: str) -> str:
        return ids.cycle_id(value)


class State(NamedTuple):
    """What the ledger says now."""

    entries: tuple[Entry, ...]
    champions: tuple[Model | None, ...]
    """Those that reigned and were not rolled back, in order; the base policy is the first."""
    candidate: Model | None

    @property
    def champion(self) -> Model | None:
        return self.champions[-1]

    def find(self, action: Action, because: str) -> Entry | None:
        return next((e for e in self.entries if (e.action, e.because) == (action, because)), None)

    def nomination(self, cycle: str) -> Entry | None:
        """The nomination since which the cycle has its candidate, where no later conclusion of the cycle refused it."""
        found: Entry | None = None
        for entry in self.entries:
            if entry.cycle != cycle or entry.action not in ("nominate", "refuse"):
                continue
            if entry.action == "refuse":
                found = None
            elif found is None or found.model != entry.model:
                found = entry
        return found

    def reigned(self, nomination: Entry, first: date) -> list[Model | None]:
        """Who reigned, in order, since a candidate was nominated and the first day of its test had begun."""
        changes = [e for e in self.entries if e.action in ("crown", "rollback")]
        before = [e for e in changes if e.number < nomination.number or e.at.date() < first]
        return [before[-1].model if before else None, *(e.model for e in changes if e not in before)]

    def released(self, cycle: str) -> bool:
        """Whether a candidate of the cycle became champion and was not rolled back."""
        mine = [e for e in self.entries if e.cycle == cycle]
        back = {e.because for e in mine if e.action == "rollback"}
        return any(e.action == "crown" and e.because not in back for e in mine)


class Change(NamedTuple):
    """What a writer wants to add."""

    action: Action
    model: Model | None
    cycle: str
    by: str
    why: str
    because: str


def read(storage: Storage) -> State:
    """Replay the ledger; a gap, a changed byte or an entry of another ledger is an error."""
    entries: list[Entry] = []
    champions: list[Model | None] = [None]
    candidate: Model | None = None
    digest = ""
    for number, path in enumerate(_paths(storage), start=1):
        if int(path[-11:-5]) != number:
            raise CorruptArtifact(f"{FOLDER}: entry {number} is missing: restore it from a backup of the store")
        data = storage.read(path) or b""
        entry = _parse(data, path)
        if entry.number != number or entry.before != digest:
            raise CorruptArtifact(f"{path} does not follow the entry before it: restore {FOLDER} from a backup")
        digest = hashlib.sha256(data).hexdigest()
        entries.append(entry)
        if entry.action == "nominate":
            candidate = entry.model
        elif entry.action == "refuse":
            candidate = None if candidate == entry.model else candidate
        elif entry.action == "crown":
            champions.append(entry.model)
            candidate = None if candidate == entry.model else candidate
        elif entry.action == "rollback" and len(champions) > 1:
            champions.pop()
    return State(tuple(entries), tuple(champions), candidate)


def append(storage: Storage, decide: Callable[[State], Change | None]) -> Entry | None:
    """Add what `decide` wants in view of the present state; None where it wants nothing.

    `decide` is asked again whenever another writer was first, so it sees what that writer did.
    """
    for _ in range(_TRIES):
        state = read(storage)
        change = decide(state)
        if change is None:
            return None
        number = len(state.entries) + 1
        last = storage.read(_path(number - 1)) if state.entries else None
        entry = Entry(
            number=number,
            at=datetime.now(UTC),
            before=hashlib.sha256(last).hexdigest() if last else "",
            **change._asdict(),
        )
        if storage.put_new(_path(number), entry.model_dump_json(indent=1).encode()):
            return entry
    raise FlywheelError(f"{FOLDER}: {_TRIES} other writers were first: run the command again")


def lines(state: State) -> Sequence[dict[str, object]]:
    """The ledger as rows for a table or JSON."""
    return [json.loads(entry.model_dump_json()) for entry in state.entries]


def _paths(storage: Storage) -> list[str]:
    found = (storage.relative(info) for info in storage.list(FOLDER))
    return sorted(path for path in found if _FILE.search(path))


def _path(number: int) -> str:
    if number > 999_999:
        raise InputError(f"{FOLDER} is full")
    return f"{FOLDER}/{number:06d}.json"


def _parse(data: bytes, path: str) -> Entry:
    try:
        return Entry.model_validate_json(data)
    except (ValidationError, InputError) as error:
        raise CorruptArtifact(f"{path} is damaged ({str(error).splitlines()[0]}): restore it from a backup") from error
