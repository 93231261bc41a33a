"""What the store adds to a stage that only copies: resolve, digest, fsync, verify, commit; beside plain Parquet."""

from __future__ import annotations

import datetime as dt
import shutil
import tempfile
from dataclasses import replace
from typing import Any

import pyarrow as pa

from benchmarks.harness import Contender, Report, compare

_STAGES = 20


def _table(rows: int) -> pa.Table:
    from flywheel_tasks.core import schemas

    columns = {
        "unit_id": [f"u{i}" for i in range(rows)],
        "day": [dt.date(2026, 11, 16)] * rows,
        "sends": list(range(rows)),
    }
    return pa.table(columns, schema=schemas.ACTIVITY)


def through_the_store(rows: int) -> int:
    """A chain of stages, each reading the table of the one before and writing it again."""
    from flywheel_tasks.core.config import FlywheelConfig, StageConfig, StoreConfig, TrackingConfig
    from flywheel_tasks.core.output import Output
    from flywheel_tasks.core.runner import run_stage
    from flywheel_tasks.core.stage import Input, Inputs, Stage
    from flywheel_tasks.core.store import Store

    table = _table(rows)

    def copy(inputs: Inputs, config: Any, out: Output) -> None:
        read = inputs["activity"].read() if inputs.get("activity") else table
        with out.table("activity") as writer:
            writer.write(read)
        out.account("unit", rows, rows)

    base = Stage("s0", "curation", "", copy, StageConfig, {"activity": "activity"})
    chain = [base] + [
        replace(base, name=f"s{i}", inputs={"activity": Input(f"s{i - 1}", "activity")}) for i in range(1, _STAGES)
    ]
    folder = tempfile.mkdtemp(prefix="flywheel-bench-")
    try:
        config = FlywheelConfig(
            store=StoreConfig(uri=folder),
            tracking=TrackingConfig(uri=f"sqlite:///{folder}/t.db"),
            stages={stage.name: StageConfig() for stage in chain},
        )
        store = Store(folder)
        for stage in chain:
            run_stage(stage, "2026-W47", config, store)
        return sum(1 for _ in store.artifacts())
    finally:
        shutil.rmtree(folder)


def plain(rows: int) -> int:
    """The same copies with bare Parquet files: no digest, no commit, no tracking."""
    import pyarrow.parquet as pq

    folder = tempfile.mkdtemp(prefix="flywheel-bench-")
    try:
        pq.write_table(_table(rows), f"{folder}/0.parquet", compression="zstd", compression_level=1)
        for i in range(1, _STAGES):
            table = pq.read_table(f"{folder}/{i - 1}.parquet")
            pq.write_table(table, f"{folder}/{i}.parquet", compression="zstd", compression_level=1)
        return _STAGES
    finally:
        shutil.rmtree(folder)


def main(quick: bool) -> Report:
    rows = 100_000
    contenders = [
        Contender("through the store, tracked", "benchmarks.bench_store:through_the_store", {"rows": rows}, _STAGES),
        Contender("bare Parquet files", "benchmarks.bench_store:plain", {"rows": rows}, _STAGES),
    ]
    title = f"{_STAGES} stages that copy {rows:,} rows"
    return compare("store", title, contenders, repeats=1 if quick else 5, unit="stages")
