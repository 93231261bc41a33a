"""Ingest: raw event logs → conversations and daily activity, the entrance of the data pipeline (Sec. 2.2, Figure 4).

Two passes over files, so memory does not grow with the log: the first parses chunks and spills events by user
(`spill`), the second assembles one bucket of users at a time (`assemble`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from flywheel_tasks.compute.blocks import map_blocks
from flywheel_tasks.core import ids, schemas
from flywheel_tasks.core.config import Operational, StageConfig
from flywheel_tasks.core.errors import ConfigError, InputError
from flywheel_tasks.core.manifest import FileRecord
from flywheel_tasks.core.output import QUARANTINE, Output
from flywheel_tasks.core.stage import Inputs, Resources, Stage
from flywheel_tasks.core.tables import PartSpec, write_part
from flywheel_tasks.curation import logs, spill
from flywheel_tasks.curation.assemble import CONFLICT, Rules, assemble, log_end, merged
from flywheel_tasks.curation.characters import read_characters

_MOST_BUCKETS = 4096
_WORTH_SHARING = 1 << 30
"""Bytes of events that one core reads in about twice the time that Ray takes to start (benchmarks/bench_ingest.py)."""


class IngestConfig(StageConfig):
    logs: tuple[str, ...] = Field(
        (),
        description="globs of raw event logs: .jsonl, .jsonl.gz, .jsonl.zst, .parquet",
        json_schema_extra=Operational,
    )
    characters: tuple[str, ...] = Field(
        (), description="globs of character cards: .jsonl or .parquet", json_schema_extra=Operational
    )
    continue_minutes: int = Field(10, ge=1, description="p(continue): the user writes again within this time (Table 2)")
    eval_share: float = Field(0.1, ge=0, lt=1, description="share of conversations held out for evaluation, by hash")
    longest_line: int = Field(4 << 20, ge=1024, description="a log line of more bytes is quarantined")
    chunk_bytes: int = Field(64 << 20, ge=1 << 10, description="bytes of log parsed by one task")
    bucket_bytes: int = Field(24 << 20, ge=1 << 12, description="bytes of log, about, assembled by one task")

    @field_validator("logs", "characters", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


@dataclass(frozen=True)
class _BucketTask:
    bucket: int
    spills: tuple[str, ...]
    chunks: tuple[tuple[str, int], ...]
    """Log name and first line number of each chunk."""
    rules: Rules
    conversations: PartSpec
    activity: PartSpec
    quarantine: PartSpec


@dataclass(frozen=True)
class _Bucket:
    conversations: FileRecord
    activity: FileRecord
    quarantine: FileRecord
    reasons: dict[str, int]
    accepted: int


def run(inputs: Inputs, config: IngestConfig, out: Output) -> None:
    """Read the raw event logs: refuse malformed lines, and events dated after the logs end, with file, line number and
    reason, pseudonymise users, drop duplicates, put late events in order, attach reactions, feedback and regenerations
    to the response they are about, and derive p(continue). Gives conversations, each user's daily sends, the character
    cards, and the quarantine, which says where a refused line stands and never repeats it: it may name a person."""
    sources = inputs.sources["logs"]
    if not sources:
        raise ConfigError(
            "ingest.logs is empty: name the raw logs, for example --set ingest.logs='/data/events/*.jsonl.gz'"
        )
    with out.table("characters") as writer:
        writer.write(read_characters(inputs.sources["characters"]))
    chunks = logs.cut(sources, config.chunk_bytes)
    size = sum(map(logs.weight, chunks))
    share = size >= _WORTH_SHARING
    buckets = min(max(math.ceil(size / config.bucket_bytes), 1), _MOST_BUCKETS)
    tasks = [
        spill.ParseTask(
            chunks=group,
            buckets=buckets,
            store_uri=out.store_uri,
            scratch=out.scratch(),
            longest_line=config.longest_line,
            forgotten=inputs.forgotten,
            user_key=ids.fingerprint(ids.user_key()),
        )
        for group in logs.grouped(chunks, config.chunk_bytes)
    ]
    parsed: list[spill.Parsed] = []
    for results in map_blocks(spill.parse_chunks, tasks, share=share):
        parsed += results
        out.progress(len(parsed), len(chunks) + buckets, "blocks")
    places = _first_lines(parsed)
    for result, (name, first) in zip(parsed, places, strict=True):
        for path in result.refused_spills:
            out.reject(_quarantine(spill.read_refused(out.store_uri, path), name, first))
    accepted = _assemble_all(parsed, places, buckets, config, out, share)
    out.account("event", rows_in=sum(p.events + p.refused for p in parsed), rows_out=accepted)
    if not accepted:
        raise InputError(_nothing(out, places[0][0] if places else sources[0].name))


def assemble_bucket(task: _BucketTask) -> _Bucket:
    """Second pass: one bucket of users, from spilled events to committed parts."""
    events = spill.read_bucket(task.conversations.store_uri, task.spills, task.bucket)
    result = assemble(events, task.rules)
    rejected = result.rejected
    places = [
        (*task.chunks[chunk], line)
        for chunk, line in zip(*(rejected[c].to_pylist() for c in ("chunk", "line")), strict=True)
    ]
    where = pa.array([f"{name}:{first + line + 1}" for name, first, line in places], pa.string())
    nothing = pa.nulls(len(rejected), pa.string())
    quarantine = pa.table([where, rejected["reason"], where, rejected["user_id"], nothing], schema=schemas.QUARANTINE)
    return _Bucket(
        conversations=write_part(task.conversations, task.bucket, [result.conversations]),
        activity=write_part(task.activity, task.bucket, [result.activity]),
        quarantine=write_part(task.quarantine, task.bucket, [quarantine]),
        reasons={count["values"]: count["counts"] for count in pc.value_counts(rejected["reason"]).to_pylist()},
        accepted=result.accepted,
    )


def _assemble_all(
    parsed: Sequence[spill.Parsed],
    chunks: Sequence[tuple[str, int]],
    buckets: int,
    config: IngestConfig,
    out: Output,
    share: bool,
) -> int:
    rules = Rules(log_end(merged(p.days for p in parsed)), config.continue_minutes, config.eval_share)
    spills = tuple(path for p in parsed for path in p.spills)
    specs = (out.parts("conversations"), out.parts("activity"), out.parts(QUARANTINE))
    tasks = [_BucketTask(bucket, spills, tuple(chunks), rules, *specs) for bucket in range(buckets)]
    accepted = conflicts = 0
    for done, result in enumerate(map_blocks(assemble_bucket, tasks, share=share), start=1):
        out.add("conversations", [result.conversations])
        out.add("activity", [result.activity])
        out.add(QUARANTINE, [result.quarantine])
        out.count_reasons(result.reasons)
        accepted += result.accepted
        conflicts += result.reasons.get(CONFLICT, 0)
        out.progress(len(parsed) + done, len(parsed) + buckets, "blocks")
    out.metric("conflicting_event_ids", conflicts)
    return accepted


def _nothing(out: Output, log: str) -> str:
    """Why a whole week of logs gave no event: nothing after it has anything to read."""
    reasons = out.rows.reasons if out.rows else {}
    if not reasons:
        return f"ingest.logs: there is no event in {log} or any other log: check that they are the right files"
    most = ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items(), key=lambda r: -r[1])[:5])
    return (
        f"ingest.logs: of {sum(reasons.values()):,} events none was accepted ({most}): compare {log} with the contract"
    )


def _first_lines(parsed: Sequence[spill.Parsed]) -> list[tuple[str, int]]:
    """For each chunk the log's name and how many of its lines come before the chunk."""
    firsts: list[tuple[str, int]] = []
    totals: dict[int, int] = {}
    for result in parsed:
        before = totals.get(result.chunk.source, 0)
        firsts.append((result.chunk.name, before))
        totals[result.chunk.source] = before + result.lines
    return firsts


def _quarantine(refused: pa.Table, name: str, first: int) -> pa.Table:
    numbers = refused["line"].to_numpy() + first + 1
    where = pa.array([f"{name}:{number}" for number in numbers], pa.string())
    nothing = pa.nulls(len(refused), pa.string())
    return pa.table([where, refused["reason"], where, refused["user"], nothing], schema=schemas.QUARANTINE)


STAGE = Stage(
    name="ingest",
    phase="curation",
    paper="Sec. 2.2, Figure 4, Table 2",
    sources=("logs", "characters"),
    outputs={"conversations": "conversation", "activity": "activity", "characters": "character"},
    config=IngestConfig,
    run=run,
    resources=Resources(cpus=2, memory_gib=4),
    uses_user_key=True,
)
