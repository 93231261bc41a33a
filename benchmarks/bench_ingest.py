"""Ingest against the same job written in DuckDB: 10⁵, 10⁶ and 10⁷ events, on one and on two cores.

The job: parse a JSONL log, skip malformed lines, hash users, drop repeated events, attach reactions to their message,
and write one row per conversation with its turns in order, and each user's sends per day. The peer does not quarantine
bad lines with their line number, does not label p(continue), and commits nothing; ours does all of that as well.
(polars has no reader that passes over a malformed line, so it can't do the job.)
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import Contender, Report, compare

_KEY = "benchmark-key-0123456789abcdef"
_NAMES = (
    *("event_id", "type", "conversation_id", "message_id", "user_id", "character_id", "role", "content", "reaction"),
    *("at", "model_version", "locale", "source"),
)


def duckdb_job(log: str, cores: int) -> dict[str, int]:
    """The same in SQL."""
    import duckdb

    folder = tempfile.mkdtemp(prefix="flywheel-bench-")
    columns = ", ".join(f"'{name}': 'VARCHAR'" for name in _NAMES)
    try:
        db = duckdb.connect(f"{folder}/spill.db", config={"threads": cores, "temp_directory": folder})
        db.execute(f"""
            create temp table events as
            select * exclude (user_id, conversation_id, "at"), "at"::timestamptz as moment,
                   sha256('{_KEY}' || user_id)[:32] as "user",
                   sha256('{_KEY}' || user_id || '/' || character_id || '/' || conversation_id)[:32] as conversation_id
            from read_json('{log}', format = 'newline_delimited', ignore_errors = true, columns = {{{columns}}})
            where event_id is not null
            qualify row_number() over (partition by conversation_id, event_id order by moment) = 1
        """)
        db.execute(f"""
            copy (
                with signal as (
                    select conversation_id, message_id, bool_or(reaction = 'love') as love,
                           bool_or(reaction = 'thumb_up') as thumb_up, bool_or(reaction = 'thumb_down') as thumb_down
                    from events where type = 'reaction' group by all)
                select m.conversation_id, any_value(m."user") as "user", any_value(character_id) as character_id,
                       list({{'role': role, 'content': content, 'at': moment, 'love': love, 'thumb_up': thumb_up,
                              'thumb_down': thumb_down}} order by moment) as turns
                from events m left join signal s using (conversation_id, message_id)
                where type = 'message' group by m.conversation_id
            ) to '{folder}/conversations.parquet' (compression zstd)
        """)
        db.execute(f"""
            copy (select "user", moment::date as day, count(*) as sends from events
                  where type = 'message' and role = 'user' group by all)
            to '{folder}/activity.parquet' (compression zstd)
        """)
        return _count(folder)
    finally:
        shutil.rmtree(folder)


def _count(folder: str) -> dict[str, int]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    sends = pc.sum(pq.read_table(f"{folder}/activity.parquet", columns=["sends"])["sends"]).as_py()
    return {"conversations": pq.read_metadata(f"{folder}/conversations.parquet").num_rows, "sends": int(sends)}


def _same(values: dict[str, Any]) -> None:
    if len({tuple(sorted(value.items())) for value in values.values()}) != 1:
        raise SystemExit(f"the contenders did not do the same job: {values}")


def main(quick: bool) -> list[Report]:
    from flywheel_tasks.simulation.bulk import write_benchmark_log

    reports = []
    sizes = (100_000,) if quick else (100_000, 1_000_000, 10_000_000)
    with tempfile.TemporaryDirectory(prefix="flywheel-bench-") as folder:
        for events in sizes:
            log = str(Path(folder) / f"{events}.jsonl")
            write_benchmark_log(log, events, seed=5)
            os.sync()  # or whoever is timed first shares the disk with what is still being written
            jobs = {"flywheel ingest": "ingest_flywheel:job", "DuckDB": "bench_ingest:duckdb_job"}
            contenders = [
                Contender(
                    f"{name}, {cores} core{'s' * (cores > 1)}",
                    f"benchmarks.{job}",
                    {"log": log, "cores": cores},
                    events,
                )
                for name, job in jobs.items()
                for cores in (1, 2)
            ]
            repeats = 1 if quick or events > 5_000_000 else 3
            title = f"ingest of {events:,} events ({os.path.getsize(log) >> 20:,} MiB of JSONL)"
            reports.append(compare(f"ingest_{events}", title, contenders, repeats=repeats, unit="events", agree=_same))
            os.unlink(log)
    return reports
