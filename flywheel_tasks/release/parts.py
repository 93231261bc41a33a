"""Parquet inputs of the readout: files of the store, or of a team's own experiment platform."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.storage import Storage


class Part(NamedTuple):
    """One file; with a store its path is relative to it. Small enough to travel to a worker."""

    path: str
    store: str = ""
    only: int = -1
    """The one row group that is meant; -1: all."""

    def groups(self, metadata: pq.FileMetaData) -> list[int]:
        return list(range(metadata.num_row_groups)) if self.only < 0 else [self.only]

    def open(self, columns: Sequence[str] = (), metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
        """The file, with `columns` read as dictionaries."""
        options: dict[str, Any] = {"read_dictionary": list(columns) or None, "metadata": metadata}
        try:
            if not self.store:
                return pq.ParquetFile(self.path, **options)
            storage = Storage(self.store)
            return pq.ParquetFile(storage.fs.open_input_file(storage.full(self.path)), **options)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{self.path} can't be read as Parquet: {str(error).splitlines()[0]}") from error


def find(patterns: str | Sequence[str], what: str) -> list[Part]:
    """The files behind paths or globs; nothing found is an error."""
    parts = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise InputError(f"no {what} file matches '{pattern}'")
        parts += [Part(path) for path in found]
    return parts


def need(schema: pa.Schema, columns: Sequence[str], where: str) -> None:
    """Refuse a file without the columns that are read."""
    missing = [name for name in columns if name not in schema.names]
    if missing:
        raise InputError(f"{where}: no column {', '.join(missing)}; it has {', '.join(schema.names)}")
