"""The output writer of one attempt: everything goes under the attempt's own prefix until the manifest names it."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from flywheel_tasks.core import ids, schemas
from flywheel_tasks.core.errors import FlywheelError, InputError
from flywheel_tasks.core.manifest import FileRecord, OutputRecord, Rows, artifact_folder
from flywheel_tasks.core.partial import Partial
from flywheel_tasks.core.progress import Progress
from flywheel_tasks.core.storage import Storage
from flywheel_tasks.core.tables import PartSpec, TableWriter

QUARANTINE = "quarantine"
_LOOSE = (*schemas.CHECKPOINTS, schemas.DERIVED, "json", "file")
_SCRATCH = "scratch"


class Output:
    """What a stage writes to. Nothing here is visible to anybody before the commit."""

    def __init__(
        self,
        storage: Storage,
        stage: str,
        key: str,
        attempt: str,
        contracts: Mapping[str, str],
        *,
        seed: int,
        cycle: str,
        forgotten: frozenset[str] = frozenset(),
    ) -> None:
        self.seed, self.cycle = seed, cycle
        self.partial = Partial(storage, stage, key, forgotten)
        self.metrics: list[tuple[str, float, int | None]] = []
        self.rows: Rows | None = None
        self._storage, self._folder, self._attempt = storage, artifact_folder(stage, key), attempt
        self._contracts = {**contracts, QUARANTINE: QUARANTINE}
        self._files: dict[str, list[FileRecord]] = defaultdict(list)
        self._reasons: Counter[str] = Counter()
        self._scratch = tempfile.TemporaryDirectory(prefix="flywheel-")
        self._on_metric: Callable[[str, float, int | None], None] | None = None
        self._progress = Progress(stage)
        self._open = ExitStack()
        self._rejects: TableWriter | None = None

    # -- tables

    @contextmanager
    def table(self, name: str) -> Iterator[TableWriter]:
        """Stream batches into the next part of a table output."""
        spec = self.parts(name)
        path = f"{spec.attempt}/{name}/rows-{len(self._files[name]):05d}.parquet"
        with self._storage.create(f"{self._folder}/{path}") as stream:
            with TableWriter(stream, spec.contract, f"output '{name}'") as writer:
                yield writer
        self.add(name, [FileRecord(path=path, bytes=stream.size, rows=writer.rows, sha256=stream.sha256)])

    def parts(self, name: str) -> PartSpec:
        """Where workers write parts of this output with `tables.write_part`; hand the records back to `add`."""
        contract = self._contract(name)
        return PartSpec(self._storage.uri, self._folder, self._attempt, name, contract)

    def scratch(self) -> str:
        """A folder of the store for what workers hand to each other; it is gone before the commit."""
        return f"{self._folder}/{self._attempt}/{_SCRATCH}"

    @property
    def store_uri(self) -> str:
        return self._storage.uri

    @property
    def uri(self) -> str:
        """Where the artifact will be, for a later cycle that reads it by name."""
        return f"{self._storage.uri}/{self._folder}"

    def add(self, name: str, records: Sequence[FileRecord]) -> None:
        """Adopt files that workers wrote."""
        self._contract(name)
        self._files[name] += records

    def reject(self, rows: pa.Table) -> None:
        """Quarantine rows, each with its reason."""
        if rows.num_rows == 0:
            return
        if self._rejects is None:
            self._rejects = self._open.enter_context(self.table(QUARANTINE))
        self._rejects.write(rows)
        self.count_reasons(rows.column("reason"))

    def count_reasons(self, reasons: pa.ChunkedArray | Mapping[str, int]) -> None:
        """Count rejected rows; `reject` does so itself, parts that workers quarantined need it."""
        if isinstance(reasons, Mapping):
            self._reasons.update(reasons)
        else:
            self._reasons.update({r["values"]: r["counts"] for r in pc.value_counts(reasons).to_pylist()})

    def account(self, unit: str, rows_in: int, rows_out: int) -> None:
        """State the row accounting; the commit is refused unless it adds up with the rejected rows."""
        reasons = dict(sorted(self._reasons.items()))
        rejected = sum(reasons.values())
        try:
            self.rows = Rows(unit=unit, rows_in=rows_in, rows_out=rows_out, rows_rejected=rejected, reasons=reasons)
        except ValueError as error:
            raise FlywheelError(f"rows are lost: {rows_in} {unit} in, {rows_out} out, {rejected} rejected") from error

    # -- everything else

    def json(self, name: str, value: Any) -> None:
        """A JSON output; NaN is refused because JSON has none."""
        self._contract(name)
        data = json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False).encode()
        path = f"{self._attempt}/{name}/{name}.json"
        with self._storage.create(f"{self._folder}/{path}") as stream:
            stream.write(data)
        self.add(name, [FileRecord(path=path, bytes=stream.size, sha256=stream.sha256)])

    def file(self, name: str, file_name: str) -> Path:
        """A local path to write one loose file to; it is stored at the end of the stage."""
        return self.folder(name) / ids.relative_path(file_name, f"output '{name}'")

    def folder(self, name: str) -> Path:
        """A local folder to write a checkpoint or loose files to; it is stored at the end of the stage."""
        self._contract(name)
        path = Path(self._scratch.name) / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def metric(self, name: str, value: float, step: int | None = None) -> None:
        """A number for tracking; with a global step it becomes a curve, without one it also enters the manifest."""
        if step is None and not math.isfinite(value):
            raise FlywheelError(f"metric '{name}' is {value}: a stage must not commit a number that is none")
        self.metrics.append((name, float(value), step))
        if self._on_metric:
            self._on_metric(name, float(value), step)

    def watch_metrics(self, callback: Callable[[str, float, int | None], None]) -> None:
        self._on_metric = callback

    def progress(self, done: float, total: float, unit: str = "rows") -> None:
        self._progress.update(done, total, unit)

    # -- the end of the attempt

    def finish(self) -> dict[str, OutputRecord]:
        """Store what is still local and return the record of every declared output."""
        self._open.close()
        self._progress.close()
        self._store_folders()
        self._check_complete()
        self._storage.delete_folder(self.scratch())
        names = [*self._contracts] if self._files.get(QUARANTINE) else [n for n in self._contracts if n != QUARANTINE]
        return {
            name: OutputRecord(contract=self._contracts[name], version=schemas.VERSION, files=tuple(self._files[name]))
            for name in names
        }

    def close(self) -> None:
        """Let go of local resources; after a failure the half-written quarantine part goes with the attempt."""
        self._progress.close()
        self._open.pop_all()
        self._scratch.cleanup()

    def _store_folders(self) -> None:
        for folder in sorted(Path(self._scratch.name).iterdir()):
            for source in sorted(p for p in folder.rglob("*") if p.is_file()):
                path = f"{self._attempt}/{folder.name}/{source.relative_to(folder).as_posix()}"
                with self._storage.create(f"{self._folder}/{path}") as stream, source.open("rb") as raw:
                    shutil.copyfileobj(raw, stream, 1 << 20)
                self.add(folder.name, [FileRecord(path=path, bytes=stream.size, sha256=stream.sha256)])

    def _check_complete(self) -> None:
        for name, contract in self._contracts.items():
            if name == QUARANTINE:
                continue
            if not self._files[name] and contract == "checkpoints":
                continue  # a short run has no model but its last
            if not self._files[name] and contract in _LOOSE:
                raise FlywheelError(f"the stage wrote nothing to its output '{name}'")
            if not self._files[name]:
                with self.table(name):
                    pass  # a table without rows is a table: readers get its schema and zero rows
        rejected = sum(self._reasons.values())
        quarantined = sum(file.rows or 0 for file in self._files[QUARANTINE])
        if rejected != quarantined:
            raise FlywheelError(f"{rejected} rows were rejected, but {quarantined} are in quarantine")
        if self.rows is None and any(
            contract not in _LOOSE for contract in self._contracts.values() if contract != QUARANTINE
        ):
            raise FlywheelError("the stage gave no row accounting: call out.account(unit, rows_in, rows_out)")

    def _contract(self, name: str) -> str:
        if name not in self._contracts:
            raise InputError(f"output '{name}' is not declared by the stage: it declares {', '.join(self._contracts)}")
        return self._contracts[name]
