"""Training rows: token sequences and what the loss needs beside them, in one Arrow file that workers map into memory.

A row is what can't be split: a pair, a conversation, the group of responses to one prompt. Its sequences share their
prompt, which is computed once, so they must meet in one pass.
"""

from __future__ import annotations

import secrets
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from flywheel_tasks.core import schemas
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.storage import UNFINISHED, external

BASE: list[pa.Field] = [
    pa.field("row_id", pa.string(), nullable=False),
    pa.field("ids", pa.list_(pa.list_(pa.int32())), nullable=False),
    pa.field("tokens", pa.int64(), nullable=False),
    pa.field("cost", pa.int64(), nullable=False),
    pa.field("count", pa.float64(), nullable=False),
]
"""`tokens` are all tokens of the row, `cost` those left when a common prompt is computed once, `count` the row's share
in the mean loss."""
TRAINED = pa.field("trained", pa.list_(pa.list_(pa.bool_())), nullable=False)
"""Per sequence: which tokens are targets."""


def schema(*extra: pa.Field) -> pa.Schema:
    """The schema of a task's rows."""
    return pa.schema([*BASE, *extra])


def row(row_id: str, ids: Sequence[NDArray[np.int32]], count: float, **extra: Any) -> dict[str, Any]:
    """One training row."""
    tokens = sum(map(len, ids))
    shared = sum(common_prefix(a, b) for a, b in pairwise(ids))
    return {"row_id": row_id, "ids": list(ids), "tokens": tokens, "cost": tokens - shared, "count": count, **extra}


def common_prefix(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """How many tokens two sequences begin with alike."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


@dataclass
class Encoded:
    """Tokenised rows, and what became of the others."""

    table: pa.Table
    rejected: pa.Table
    """Schema quarantine."""
    dropped_turns: int = 0
    """Turns of history cut from the left to fit the context."""

    @property
    def reasons(self) -> Mapping[str, int]:
        return Counter(self.rejected.column("reason").to_pylist())


@dataclass
class Collector:
    """Collects the rows of one block and the reasons against the others."""

    kept: list[dict[str, Any]] = field(default_factory=list)
    rejects: list[dict[str, Any]] = field(default_factory=list)
    dropped_turns: int = 0

    def reject(self, row_id: str, reason: str, where: str, user: str | None) -> None:
        self.rejects.append({"row_id": row_id, "reason": reason, "where": where, "user": user, "raw": None})

    def finish(self, row_schema: pa.Schema) -> Encoded:
        return Encoded(
            pa.Table.from_pylist(self.kept, row_schema),
            pa.Table.from_pylist(self.rejects, schemas.QUARANTINE),
            self.dropped_turns,
        )


@dataclass(frozen=True)
class RowFile:
    """Rows in one uncompressed Arrow file at a URI that every worker can reach."""

    uri: str
    rows: int

    @classmethod
    def write(cls, uri: str, tables: Iterable[pa.Table]) -> RowFile:
        """Stream tables of one schema into the file; no more than one of them is in memory. It takes its name when it
        is whole: learners of another attempt may have mapped the file of that name, and go on with it."""
        found = iter(tables)
        first = next(found, None)
        if first is None:
            raise InputError("there is nothing to train on: no table of rows was given")
        fs, path = external(uri)
        if local := uri.startswith("file://"):
            fs.create_dir(path.rpartition("/")[0], recursive=True)
        fresh = f"{path}.{secrets.token_hex(6)}{UNFINISHED}" if local else path  # an object appears when it is whole
        total = 0
        try:
            with fs.open_output_stream(fresh) as stream, pa.ipc.new_file(stream, first.schema) as writer:
                for table in _chain(first, found):
                    writer.write_table(table, max_chunksize=4096)
                    total += table.num_rows
            if total == 0:
                raise InputError("there is nothing to train on: every row was rejected or none came in")
            if local:
                fs.move(fresh, path)
        finally:
            if local:
                with suppress(FileNotFoundError):
                    fs.delete_file(fresh)
        return cls(uri, total)

    def open(self) -> pa.Table:
        """The rows; on this machine's disk they stay there, and pages come and go with use."""
        scheme = urlsplit(self.uri).scheme
        if scheme == "file":
            return pa.ipc.open_file(pa.memory_map(urlsplit(self.uri).path)).read_all()
        fs, path = external(self.uri)
        with tempfile.NamedTemporaryFile(prefix="flywheel-rows-") as local:
            with fs.open_input_stream(path) as stream:
                while chunk := stream.read(1 << 22):
                    local.write(chunk)
            local.flush()
            return pa.ipc.open_file(pa.memory_map(local.name)).read_all()  # the mapping outlives the name


def _chain(first: pa.Table, rest: Iterator[pa.Table]) -> Iterator[pa.Table]:
    yield first
    yield from rest


def take(table: pa.Table, rows: NDArray[np.int64]) -> pa.Table:
    """These rows in this order. Arrow would join all chunks of a nested column first: here only what is asked for is
    read from the file."""
    starts = np.cumsum([0, *(batch.num_rows for batch in table.to_batches())])
    batches, order = table.to_batches(), np.argsort(rows, kind="stable")
    where = np.searchsorted(starts, rows[order], side="right") - 1
    found = [batches[i].take(pa.array(rows[order][where == i] - starts[i])) for i in np.unique(where)]
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return pa.Table.from_batches(found, table.schema).combine_chunks().take(pa.array(back))


def sequences(table: pa.Table) -> tuple[list[NDArray[np.int32]], NDArray[np.int64]]:
    """All sequences of a table's rows, in order, and how many each row has."""
    column = table.column("ids").combine_chunks()
    per_row = np.diff(column.offsets.to_numpy()).astype(np.int64)
    inner = column.flatten()
    return split(inner), per_row


def split(lists: pa.ListArray) -> list[Any]:
    """The numpy views of a list array's items."""
    flat = lists.flatten().to_numpy(zero_copy_only=False)
    ends = np.cumsum(np.diff(lists.offsets.to_numpy()))
    return np.split(flat, ends[:-1]) if len(ends) else []


def flat_targets(table: pa.Table) -> NDArray[np.bool_]:
    """The `trained` marks of all sequences, in order, as one array."""
    return table.column("trained").combine_chunks().flatten().flatten().to_numpy(zero_copy_only=False)
