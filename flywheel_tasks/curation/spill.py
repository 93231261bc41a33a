"""First pass of ingest: parse a chunk of the logs, pseudonymise, and spill its events by user.

A spill file has one record batch per bucket of users, so the second pass reads its bucket without the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from flywheel_tasks.core import ids
from flywheel_tasks.core.errors import ConfigError
from flywheel_tasks.core.quarantine import FORGOTTEN
from flywheel_tasks.core.storage import Storage
from flywheel_tasks.curation import events, logs
from flywheel_tasks.curation.assemble import SPILLED, Days, days, merged

REFUSED = pa.schema([("line", pa.int64()), ("reason", pa.string()), ("user", pa.string())])
_SPILL_ROWS = 60_000
_SPILL_BYTES = 64 << 20

Refused = Sequence[tuple[int, str, bytes]]


@dataclass(frozen=True)
class ParseTask:
    chunks: tuple[logs.Chunk, ...]
    buckets: int
    store_uri: str
    scratch: str
    longest_line: int
    forgotten: frozenset[str]
    user_key: str
    """Fingerprint of the driver's key: a worker with another one would give every user a second pseudonym."""


@dataclass(frozen=True)
class Parsed:
    """What came of a chunk; the rows themselves are in the spill files."""

    chunk: logs.Chunk
    lines: int
    events: int
    refused: int
    days: Days
    spills: tuple[str, ...]
    refused_spills: tuple[str, ...]


class _User(msgspec.Struct):
    user_id: str


_USER = msgspec.json.Decoder(_User)


def parse_chunks(task: ParseTask) -> list[Parsed]:
    """Parse and spill the task's chunks. Memory is bounded by the spill size, not by theirs."""
    if ids.fingerprint(ids.user_key()) != task.user_key:
        raise ConfigError(f"a worker's {ids.USER_KEY_VARIABLE} differs from the driver's: set the same on every node")
    return [_parse_chunk(task, chunk) for chunk in task.chunks]


def _parse_chunk(task: ParseTask, chunk: logs.Chunk) -> Parsed:
    spiller = _Spiller(task, chunk)
    if chunk.name.endswith(".parquet"):
        for table in logs.tables(chunk):
            spiller.take(*events.parse_table(table), lines=len(table))
    else:
        for block in logs.line_blocks(chunk, task.longest_line):
            if isinstance(block, logs.TooLong):
                spiller.refuse([(0, f"line longer than {task.longest_line} bytes", block.head)])
                spiller.lines += 1
            else:
                spiller.take(*events.parse_lines(block), lines=block.count(b"\n") or 1)
    return spiller.finish()


def read_bucket(store_uri: str, paths: Iterable[str], bucket: int) -> pa.Table:
    """One bucket's events from all spill files."""
    storage = Storage(store_uri)
    batches = []
    for path in paths:
        with storage.open(path) as stream:
            batches.append(pa.ipc.open_file(stream).get_batch(bucket))
    return pa.Table.from_batches(batches, SPILLED)


def read_refused(store_uri: str, path: str) -> pa.Table:
    with Storage(store_uri).open(path) as stream:
        return pa.ipc.open_file(stream).read_all()


def pseudonymise(table: pa.Table, secret: bytes) -> pa.Table:
    """Replace the ids that lead to a person. A conversation is one user's with one character: ids that users share
    by accident or by malice do not join their words."""
    user = _mapped(table["user_id"], lambda user_id: ids.pseudonym(user_id, secret))
    full = pc.binary_join_element_wise(user, table["character_id"], table["conversation_id"], "/")
    conversation = _mapped(full, lambda address: ids.pseudonym(address, secret))
    for name, column in (("user_id", user), ("conversation_id", conversation)):
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table


def by_bucket(table: pa.Table, buckets: int) -> list[pa.RecordBatch]:
    """The rows of each bucket of users, in their order; empty buckets included."""
    if buckets == 1:
        return _batches(table)
    users = table["user_id"].combine_chunks().dictionary_encode()
    of_user = np.array([int(user[:8], 16) for user in users.dictionary.to_pylist()], np.int64) % buckets
    bucket = of_user[users.indices.to_numpy()] if len(table) else np.zeros(0, np.int64)
    order = np.argsort(bucket, kind="stable")
    ends = np.cumsum(np.bincount(bucket, minlength=buckets))
    table = table.take(pa.array(order)).combine_chunks()
    return [
        batch
        for start, end in zip(np.r_[0, ends[:-1]], ends, strict=True)
        for batch in _batches(table.slice(start, end - start))
    ]


def _batches(table: pa.Table) -> list[pa.RecordBatch]:
    """Exactly one batch, also where there are no rows."""
    return table.combine_chunks().to_batches() or [pa.RecordBatch.from_pylist([], table.schema)]


def _mapped(column: pa.ChunkedArray | pa.Array, function: Any) -> pa.Array:
    """`function` of each distinct value, once."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    encoded = column.dictionary_encode()
    values = pa.array([function(value) for value in encoded.dictionary.to_pylist()], pa.string())
    return values.take(encoded.indices)


class _Spiller:
    """Holds parsed events and writes them out before they grow large."""

    def __init__(self, task: ParseTask, chunk: logs.Chunk) -> None:
        self.lines = 0
        self._task, self._chunk, self._secret = task, chunk, ids.user_key()
        self._storage = Storage(task.store_uri)
        self._held: list[pa.Table] = []
        self._refused: list[dict[str, Any]] = []
        self._events = self._refusals = 0
        self._days: Days = {}
        self._spills: list[str] = []
        self._refused_spills: list[str] = []

    def take(self, table: pa.Table, numbers: npt.NDArray[np.int64], refused: Refused, lines: int) -> None:
        if len(table):
            self._hold(pseudonymise(table, self._secret), numbers + self.lines)
        self.refuse(refused)
        self.lines += lines
        if sum(len(held) for held in self._held) >= _SPILL_ROWS or sum(t.nbytes for t in self._held) >= _SPILL_BYTES:
            self._spill()

    def refuse(self, refused: Refused) -> None:
        for number, reason, line in refused:
            user = self._user_of(line)
            if user in self._task.forgotten:
                self._refuse(number + self.lines, FORGOTTEN, None)
            else:
                self._refuse(number + self.lines, reason, user)

    def finish(self) -> Parsed:
        self._spill()
        self._spill_refused()
        return Parsed(
            chunk=self._chunk,
            lines=self.lines,
            events=self._events,
            refused=self._refusals,
            days=self._days,
            spills=tuple(self._spills),
            refused_spills=tuple(self._refused_spills),
        )

    def _hold(self, table: pa.Table, lines: npt.NDArray[np.int64]) -> None:
        chunk = pa.array(np.full(len(table), self._chunk.index, np.int32))
        table = table.append_column("chunk", chunk).append_column("line", pa.array(lines)).cast(SPILLED)
        gone = pc.is_in(table["user_id"], pa.array(sorted(self._task.forgotten), pa.string()))
        for line in table.filter(gone)["line"].to_pylist():
            self._refuse(line, FORGOTTEN, None)
        table = table.filter(pc.invert(gone))
        self._events += len(table)
        self._held.append(table)
        self._days = merged((self._days, days(table["at"])))

    def _user_of(self, line: bytes) -> str | None:
        """Whose line it is, where it can still be told, so that they can have it forgotten."""
        try:
            return ids.pseudonym(_USER.decode(line).user_id, self._secret)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None

    def _refuse(self, line: int, reason: str, user: str | None) -> None:
        self._refused.append({"line": line, "reason": reason, "user": user})
        self._refusals += 1
        if len(self._refused) >= _SPILL_ROWS // 4:
            self._spill_refused()

    def _spill(self) -> None:
        if self._held:
            table = pa.concat_tables(self._held)
            self._spills.append(self._write("events", by_bucket(table, self._task.buckets)))
            self._held = []

    def _spill_refused(self) -> None:
        if self._refused:
            self._refused_spills.append(self._write("refused", _batches(pa.Table.from_pylist(self._refused, REFUSED))))
            self._refused = []

    def _write(self, kind: str, batches: Sequence[pa.RecordBatch]) -> str:
        number = len(self._spills) + len(self._refused_spills)
        path = f"{self._task.scratch}/{kind}-{self._chunk.index:06d}-{number:04d}.arrow"
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with (
            self._storage.create(path) as stream,
            pa.ipc.new_file(stream, batches[0].schema, options=options) as writer,
        ):
            for batch in batches:
                writer.write_batch(batch)
        return path
