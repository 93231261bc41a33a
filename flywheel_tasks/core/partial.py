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
from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.core.storage import UNFINISHED, Storage
from flywheel_tasks.core.store import forgotten_users

FOLDER = "partial"
_DIGEST = 64


class Partial:
    """Named pieces, each there whole or not at all; a damaged one counts as absent and is made again.

    Pieces made before a user was forgotten are not found afterwards, and an attempt that began before makes no more.
    """

    def __init__(self, storage: Storage, stage: str, key: str, forgotten: frozenset[str] = frozenset()) -> None:
        self._storage, self._forgotten = storage, forgotten
        self._all = f"{FOLDER}/{ids.name(stage, 'stage')}/{ids.key(key)}"
        self._folder = f"{self._all}/{_known(forgotten)}"

    @property
    def uri(self) -> str:
        """The folder itself, for a library that keeps its own files."""
        return f"{self._storage.uri}/{self._folder}"

    def put(self, name: str, data: bytes) -> None:
        if forgotten_users(self._storage) - self._forgotten:
            raise FlywheelError(f"{self._all}: a user was forgotten since this attempt began: run the stage again")
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


def clear_outdated(storage: Storage) -> None:
    """Remove what was left by attempts that did not know of every forgotten user: it may hold their words."""
    current = _known(forgotten_users(storage))
    folders = [FOLDER]
    for _ in ("stage", "key", "known"):
        found = [info for folder in folders for info in storage.list(folder)]
        folders = [storage.relative(info) for info in found if info.type == pafs.FileType.Directory]
    for folder in folders:
        if not folder.endswith(f"/{current}"):
            storage.delete_folder(folder)


def _known(forgotten: frozenset[str]) -> str:
    return hashlib.sha256("\n".join(sorted(forgotten)).encode()).hexdigest()[:16]
