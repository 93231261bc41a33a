"""What one attempt leaves for the next attempt of the same artifact: finished chunks and training state.

It lies under the artifact's key, so only work that would give the same artifact can find it. It goes with the commit
and whenever a user is forgotten: it may hold their words.
"""

from __future__ import annotations

import hashlib
import io

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from flywheel_tasks.core import ids
from flywheel_tasks.core.storage import UNFINISHED, Storage

FOLDER = "partial"
_DIGEST = 64


class Partial:
    """Named pieces, each there whole or not at all; a damaged one counts as absent and is made again.

    Pieces made before a user was forgotten are not found afterwards, not even those of an attempt that ran meanwhile.
    """

    def __init__(self, storage: Storage, stage: str, key: str, forgotten: frozenset[str] = frozenset()) -> None:
        known = hashlib.sha256("\n".join(sorted(forgotten)).encode()).hexdigest()[:16]
        self._storage, self._all = storage, f"{FOLDER}/{ids.name(stage, 'stage')}/{ids.key(key)}"
        self._folder = f"{self._all}/{known}"

    @property
    def uri(self) -> str:
        """The folder itself, for a library that keeps its own files."""
        return f"{self._storage.uri}/{self._folder}"

    def put(self, name: str, data: bytes) -> None:
        digest = hashlib.sha256(data).hexdigest().encode()
        self._storage.put(self._path(name), digest + data)

    def get(self, name: str) -> bytes | None:
        stored = self._storage.read(self._path(name))
        if stored is None or hashlib.sha256(stored[_DIGEST:]).hexdigest().encode() != stored[:_DIGEST]:
            return None
        return stored[_DIGEST:]

    def names(self) -> list[str]:
        found = self._storage.list(f"{self._folder}/pieces")
        names = [info.base_name for info in found if info.type == pafs.FileType.File]
        return [name for name in names if not name.endswith(UNFINISHED)]

    def put_table(self, name: str, table: pa.Table) -> None:
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", compression_level=1)
        self.put(name, buffer.getvalue())

    def table(self, name: str, schema: pa.Schema) -> pa.Table | None:
        """The table, or None where there is none of exactly this schema."""
        data = self.get(name)
        if data is None:
            return None
        table = pq.read_table(io.BytesIO(data))
        return table if table.schema.equals(schema, check_metadata=False) else None

    def clear(self) -> None:
        """Remove what every attempt at this artifact left."""
        self._storage.delete_folder(self._all)

    def _path(self, name: str) -> str:
        return f"{self._folder}/pieces/{ids.name(name, 'piece')}"
