"""Parquet parts: written once with size, rows and sha256, verified on every read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flywheel_tasks.core import schemas
from flywheel_tasks.core.errors import CorruptArtifact
from flywheel_tasks.core.manifest import FileRecord, OutputRecord
from flywheel_tasks.core.storage import Storage

_ROW_GROUP = 1 << 16
_PARQUET: dict[str, Any] = {"compression": "zstd", "compression_level": 1, "store_schema": True}


@dataclass(frozen=True)
class PartSpec:
    """Where the parts of one output go; small enough to travel to a worker."""

    store_uri: str
    folder: str
    attempt: str
    output: str
    contract: str


class TableWriter:
    """Streams batches of one schema into one Parquet part."""

    def __init__(self, stream: Any, contract: str, where: str) -> None:
        self._schema, self._where = schemas.get(contract), where
        self._parquet = pq.ParquetWriter(stream, self._schema, **_PARQUET)
        self.rows = 0

    def write(self, table: pa.Table | pa.RecordBatch) -> None:
        table = schemas.conform(table, self._schema, self._where)
        self._parquet.write_table(table, row_group_size=_ROW_GROUP)
        self.rows += table.num_rows

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self._parquet.close()
        else:
            self._parquet.is_open = False  # a footer would only be written to a file nobody will ever read


def write_part(spec: PartSpec, index: int, batches: Iterator[pa.Table] | Sequence[pa.Table]) -> FileRecord:
    """Write one part of an output. Safe in any process; only the manifest makes it visible."""
    storage = Storage(spec.store_uri)
    path = f"{spec.attempt}/{spec.output}/part-{index:05d}.parquet"
    with storage.create(f"{spec.folder}/{path}") as stream:
        with TableWriter(stream, spec.contract, f"output '{spec.output}'") as writer:
            for batch in batches:
                writer.write(batch)
    return FileRecord(path=path, bytes=stream.size, rows=writer.rows, sha256=stream.sha256)


def verify(storage: Storage, folder: str, file: FileRecord) -> None:
    """Refuse a file that is missing or differs from its manifest in a single bit."""
    path = f"{folder}/{file.path}"
    try:
        size, sha256 = storage.sha256(path)
    except FileNotFoundError as error:
        raise CorruptArtifact(f"{path} is missing: its artifact was purged or damaged; run the stage again") from error
    if size != file.bytes or sha256 != file.sha256:
        raise CorruptArtifact(
            f"{path} is damaged: sha256 {sha256[:12]}… of {size} bytes, the manifest says {file.sha256[:12]}… of "
            f"{file.bytes}; restore it, or delete its folder and run the stage again"
        )


class TableReader:
    """One committed table. Every part is verified before its first row is handed out."""

    def __init__(self, storage: Storage, folder: str, output: OutputRecord) -> None:
        self._storage, self._folder, self._output = storage, folder, output
        self.schema = schemas.get(output.contract)
        self.rows = output.rows
        self._verified: set[str] = set()

    @property
    def files(self) -> list[str]:
        """Paths within the store, verified, for a worker that reads a part by itself."""
        return [self._check(file) for file in self._output.files]

    @property
    def storage(self) -> Storage:
        return self._storage

    def batches(self, columns: Sequence[str] | None = None, batch_size: int = 8192) -> Iterator[pa.RecordBatch]:
        for file in self._output.files:
            with self._storage.open(self._check(file)) as stream:
                parquet = pq.ParquetFile(stream)
                self._same_schema(parquet.schema_arrow, file)
                yield from parquet.iter_batches(batch_size=batch_size, columns=columns)

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        schema = self.schema if columns is None else pa.schema([self.schema.field(name) for name in columns])
        return pa.Table.from_batches(list(self.batches(columns)), schema)

    def _check(self, file: FileRecord) -> str:
        if file.path not in self._verified:
            verify(self._storage, self._folder, file)
            self._verified.add(file.path)
        return f"{self._folder}/{file.path}"

    def _same_schema(self, found: pa.Schema, file: FileRecord) -> None:
        if not found.equals(self.schema, check_metadata=False):
            raise CorruptArtifact(
                f"{self._folder}/{file.path} does not have the schema '{self._output.contract}' version "
                f"{schemas.VERSION}: it was written by another version; run its stage again"
            )
