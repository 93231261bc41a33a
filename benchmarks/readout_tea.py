"""tea-tasting, the best Python peer for A/B metrics, on units that DuckDB aggregates."""

from __future__ import annotations

import duckdb
import tea_tasting as tt


def tea_tasting(folder: str) -> str:
    """The best peer: delta-method means and ratios over per-unit rows, which it has DuckDB aggregate through ibis."""
    rows = duckdb.sql(
        "select arm as variant, coalesce(k, 0) as days, coalesce(s, 0) as sends, (coalesce(s, 0) > 0)::int as active "
        f"from '{folder}/exposures.parquet' left join (select unit_id, sum(sends)::bigint s, "
        f"count(*) filter (sends > 0) k from '{folder}/activity.parquet' group by unit_id) using (unit_id)"
    ).to_arrow_table()
    experiment = tt.Experiment(
        breadth=tt.Mean("days"), depth=tt.RatioOfMeans("sends", "active"), sends=tt.Mean("sends")
    )
    return str(experiment.analyze(rows, control="control"))
