"""The readout against DuckDB and tea-tasting on the same Parquet: 2 million units over 7 days, random 64-bit ids."""

from __future__ import annotations

import datetime as dt
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import Contender, Report, compare

FIRST_DAY = "2026-11-02"
AS_OF = dt.date(2026, 11, 9)


def main(quick: bool = False) -> list[Report]:
    sizes = [100_000] if quick else [2_000_000, 8_000_000]
    with tempfile.TemporaryDirectory(prefix="bench-readout-") as folder:
        return [_size(units, folder, quick) for units in sizes]


def _size(units: int, folder: str, quick: bool) -> Report:
    where = {"folder": f"{folder}/{units}"}
    write(units, **where)
    rows = 7 * units
    contenders = [
        Contender("DuckDB scan", "benchmarks.readout_duckdb:duckdb_scan", where | {"layout": False}, rows),
        Contender("DuckDB GROUP BY unit", "benchmarks.readout_duckdb:duckdb_units", where, rows),
        Contender("DuckDB GROUP BY + join", "benchmarks.readout_duckdb:duckdb_arms", where, rows),
        Contender("readout (sums)", "benchmarks.readout_flywheel:sums", where | {"layout": False}, rows),
        Contender("readout (whole)", "benchmarks.readout_flywheel:whole", where | {"layout": False}, rows),
        Contender("DuckDB scan of the layout", "benchmarks.readout_duckdb:duckdb_scan", where | {"layout": True}, rows),
        Contender("readout (sums) from the layout", "benchmarks.readout_flywheel:sums", where | {"layout": True}, rows),
        Contender(
            "readout (whole) from the layout", "benchmarks.readout_flywheel:whole", where | {"layout": True}, rows
        ),
    ]
    if units <= 2_000_000:
        contenders.append(Contender("tea-tasting", "benchmarks.readout_tea:tea_tasting", where, rows))
    million = f"{units / 1e6:g} million"
    return compare(
        f"readout_{units // 1000}k", f"A/B readout, {million} units x 7 days", contenders,
        repeats=1 if quick else 3, agree=same,
        notes=[
            "'sums' is what the GROUP BY + join computes, with every daily and cumulative sum beside it; 'whole' adds",
            "checks, Fieller's sets, the boundary and the decision. The layout has one row per active unit-day.",
        ],
    )  # fmt: skip


def write(units: int, folder: str) -> None:
    """A random experiment: every unit has a row on every day, in random order, half of them without a send."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from flywheel_tasks.release.layout import write_layout
    from flywheel_tasks.release.parts import Part
    from flywheel_tasks.release.readout_config import ReadoutConfig

    path = Path(folder)
    path.mkdir(parents=True)
    rng = np.random.default_rng(17)
    ids = rng.integers(-(2**63), 2**63 - 1, units)
    arm = rng.integers(0, 2, units)
    names = pa.array(["control", "test"])
    exposures = pa.table(
        {
            "experiment": pa.repeat(pa.scalar("release"), units),
            "unit_id": ids,
            "arm": names.take(pa.array(arm)),
            "exposed_at": pa.array(np.full(units, np.datetime64(FIRST_DAY, "us"))).cast(pa.timestamp("us", tz="UTC")),
        }
    )
    pq.write_table(exposures, path / "exposures.parquet", row_group_size=1 << 20)
    writer = None
    for day in range(7):
        order = rng.permutation(units)
        sends = rng.poisson(0.7 + 0.03 * arm[order]) * rng.geometric(0.2, units)
        when = np.full(units, np.datetime64(FIRST_DAY) + day)
        table = pa.table({"unit_id": ids[order], "day": pa.array(when), "sends": sends})
        writer = writer or pq.ParquetWriter(path / "activity.parquet", table.schema)
        writer.write_table(table, row_group_size=1 << 20)
    if writer:
        writer.close()
    write_layout(
        [Part(f"{path}/exposures.parquet")],
        [Part(f"{path}/activity.parquet")],
        ReadoutConfig(as_of=AS_OF),
        path / "layout",
    )


def same(results: dict[str, Any]) -> None:
    """Every contender that counts the arms found the same integers."""
    exact = {name: r for name, r in results.items() if isinstance(r, dict)}
    first = next(iter(exact.values()))
    for name, found in exact.items():
        if found != first:
            raise SystemExit(f"{name} disagrees: {found} against {first}")
