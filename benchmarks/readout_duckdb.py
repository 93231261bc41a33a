"""DuckDB as the floor (a scan) and as a peer (its own GROUP BY) of the readout."""

from __future__ import annotations

import duckdb

from benchmarks.readout_files import files


def duckdb_scan(folder: str, layout: bool) -> list[int]:
    """The floor: every column read once and folded."""
    unit = "unit_index" if layout else "unit_id"
    columns = f"count(*), bit_xor({unit}), max(epoch(day))::bigint, sum(sends)::bigint"
    found = duckdb.sql(f"select {columns} from '{files(folder, layout)[1]}'").fetchall()
    return [int(x) for x in found[0]]


def duckdb_units(folder: str) -> list[int]:
    found = duckdb.sql(
        "select count(*), sum(s)::bigint, sum(k)::bigint from (select unit_id, sum(sends) s, "
        f"count(*) filter (sends > 0) k from '{folder}/activity.parquet' group by unit_id)"
    ).fetchall()
    return [int(x) for x in found[0]]


def duckdb_arms(folder: str) -> dict[str, list[int]]:
    found = duckdb.sql(
        "select arm, count(*), sum(k), sum(k * k), count(*) filter (s > 0), sum(s), sum(s * s) from (select unit_id, "
        f"sum(sends) s, count(*) filter (sends > 0) k from '{folder}/activity.parquet' group by unit_id) "
        f"join '{folder}/exposures.parquet' using (unit_id) group by arm order by arm"
    ).fetchall()
    return {row[0]: [int(x) for x in row[1:]] for row in found}
