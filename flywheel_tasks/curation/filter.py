"""Filter, Phase I of curation (Sec. 2.2.1, 2.6): privacy and safety, fail-closed; then language, then prompts."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from flywheel_tasks.compute.blocks import map_blocks
from flywheel_tasks.core.config import Operational, StageConfig
from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.core.manifest import FileRecord
from flywheel_tasks.core.output import QUARANTINE, Output
from flywheel_tasks.core.stage import Input, Inputs, Resources, Stage
from flywheel_tasks.core.tables import PartSpec, TableReader, write_part
from flywheel_tasks.curation.language import LanguageConfig
from flywheel_tasks.curation.privacy import PrivacyConfig
from flywheel_tasks.curation.prompts import PromptConfig
from flywheel_tasks.curation.safety import SafetyConfig

_BATCH = 2048
_REAL_SHARE = 0.1
"""A day of the traffic has at least this share of the busiest day's conversations."""
_NO_NAMES = (
    "names of people are not looked for: set filter.privacy.token_model to a model that finds them, such as a "
    "transformers token classifier with PER labels"
)
_log = logging.getLogger(__name__)


class FilterConfig(StageConfig):
    privacy: PrivacyConfig = Field(PrivacyConfig(), description="identifiers and what happens to them")
    safety: SafetyConfig = Field(SafetyConfig(), description="the classifier over prompts and responses")
    language: LanguageConfig = Field(LanguageConfig(), description="language and code-mixing")
    prompts: PromptConfig = Field(PromptConfig(), description="how conversations are cut into prompts")
    most_unjudged: float = Field(
        0.05, ge=0, le=1,
        description="stop, and write nothing, when a larger share of conversations was rejected for classifier_error: "
        "an outage of the guard model fails the stage instead of giving a small artifact (1: never stop)",
    )  # fmt: skip
    block_rows: int = Field(
        16384, ge=1, description="conversations cleaned and written by one task", json_schema_extra=Operational
    )


@dataclass(frozen=True)
class _Task:
    index: int
    path: str
    """A verified part of ingest's conversations, within the store."""
    first: int
    rows: int
    config: FilterConfig
    champion: str | None
    forgotten: frozenset[str]
    conversations: PartSpec
    prompts: PartSpec
    quarantine: PartSpec


@dataclass(frozen=True)
class _Done:
    conversations: FileRecord
    prompts: FileRecord
    quarantine: FileRecord
    rows: int
    counts: dict[tuple[str, ...], int]


def run(inputs: Inputs, config: FilterConfig, out: Output) -> None:
    """Remove what identifies a person and what is unsafe: identifiers are masked or their conversation dropped, unsafe
    prompts and responses drop theirs, and a classifier that fails or hangs rejects the row, never passes it. Then tell
    the language of every turn, and cut the clean conversations into prompts. Rejected rows keep ids and a reason, no
    text; the report holds counts only."""
    for warning in _warnings(config):
        _log.warning("filter: %s", warning)
    reader = inputs["conversations"]
    champion = config.prompts.champion or latest_version(reader)
    specs = (out.parts("conversations"), out.parts("prompts"), out.parts(QUARANTINE))
    tasks = [
        _Task(index, path, first, rows, config, champion, inputs.forgotten, *specs)
        for index, (path, first, rows) in enumerate(_blocks(reader, config.block_rows))
    ]
    counts: Counter[tuple[str, ...]] = Counter()
    for done, result in enumerate(map_blocks(clean_block, tasks), start=1):
        out.add("conversations", [result.conversations])
        out.add("prompts", [result.prompts])
        out.add(QUARANTINE, [result.quarantine])
        counts.update(result.counts)
        out.progress(done, len(tasks), "blocks")
    outcome = {key[1]: n for key, n in counts.items() if key[0] == "outcome"}
    _refuse_outage(outcome, reader.rows, config.most_unjudged)
    accepted = outcome.pop("accepted", 0)
    out.count_reasons(outcome)
    out.account("conversation", rows_in=reader.rows, rows_out=accepted)
    out.json("report", report(counts, reader.rows, champion, config))
    out.metric("acceptance", accepted / reader.rows if reader.rows else 0.0)
    out.metric("prompts", counts["prompts", "all"])


def clean_block(task: _Task) -> _Done:
    """Clean one block of conversations and write its parts; runs in any process."""
    from flywheel_tasks.curation.scrubbing import Rules, clean

    config = task.config
    rules = Rules(config.privacy, config.safety, config.language, config.prompts, task.champion, task.forgotten)
    part = task.path.rsplit("/", 1)[-1]
    table = _read_rows(task)
    pieces = [
        clean(table.slice(start, _BATCH), part, task.first + start, rules) for start in range(0, table.num_rows, _BATCH)
    ]
    counts: Counter[tuple[str, ...]] = Counter()
    for piece in pieces:
        counts.update(piece.counts)
    return _Done(
        write_part(task.conversations, task.index, [piece.conversations for piece in pieces]),
        write_part(task.prompts, task.index, [piece.prompts for piece in pieces]),
        write_part(task.quarantine, task.index, [piece.rejected for piece in pieces]),
        table.num_rows,
        dict(counts),
    )


def latest_version(reader: TableReader) -> str | None:
    """The version with most production conversations among those that ended on the last real day of the traffic: one
    clock that runs ahead, or the first minutes of a day, do not say what is in production."""
    ends: Counter[tuple[Any, str]] = Counter()
    for batch in reader.batches(["source", "model_version", "turns.list.element.at"]):
        said = pc.greater(pc.list_value_length(batch["turns"]), 0)
        used = batch.filter(
            pc.and_(said, pc.and_(pc.equal(batch["source"], "production"), pc.is_valid(batch["model_version"])))
        )
        lists = used["turns"]
        final_turns = lists.flatten().take(pc.subtract(lists.offsets[1:], lists.offsets[0].as_py() + 1))
        days = pc.floor_temporal(pc.struct_field(final_turns, "at"), unit="day").to_pylist()
        ends.update(zip(days, used["model_version"].to_pylist(), strict=True))
    if not ends:
        return None
    on_day: Counter[Any] = Counter()
    for (day, _), count in ends.items():
        on_day[day] += count
    final = max(day for day, count in on_day.items() if count >= _REAL_SHARE * max(on_day.values()))
    return max((count, version) for (day, version), count in ends.items() if day == final)[1]


def _warnings(config: FilterConfig) -> list[str]:
    return [] if config.privacy.token_model else [_NO_NAMES]


def report(counts: Counter[tuple[str, ...]], rows: int, champion: str | None, config: FilterConfig) -> dict[str, Any]:
    """Counts by reason, locale and source."""
    tables: dict[str, dict[str, Counter[str]]] = {"locale": defaultdict(Counter), "source": defaultdict(Counter)}
    flat: dict[str, Counter[str]] = defaultdict(Counter)
    for key, number in counts.items():
        if key[0] in tables:
            tables[key[0]][key[1]][key[2]] += number
        elif key[0] == "entity":
            flat[f"identifiers_{key[2]}"][key[1]] += number
        else:
            flat[key[0]][key[-1]] += number
    accepted = flat["outcome"].pop("accepted", 0)
    return {
        "conversations": {"in": rows, "out": accepted, "rejected": rows - accepted},
        "by_reason": dict(flat["outcome"]),
        "by_locale": {label: dict(found) for label, found in tables["locale"].items()},
        "by_source": {label: dict(found) for label, found in tables["source"].items()},
        "identifiers_masked": dict(flat["identifiers_masked"]),
        "identifiers_in_rejected": dict(flat["identifiers_rejected"]),
        "user_turns_by_language": dict(flat["turn_language"]),
        "conversations_by_language": dict(flat["conversation_language"]),
        "code_mixed_user_turns": counts["code_mixed_user_turns",],
        "prompts": {"all": counts["prompts", "all"], "near_policy": counts["prompts", "near_policy"]},
        "prompts_by_depth": dict(flat["prompt_depth"]),
        "near_policy_version": champion,
        "safety_classifier": config.safety.classifier,
        "model_based_privacy": config.privacy.token_model is not None,
        "warnings": _warnings(config),
    }


def _blocks(reader: TableReader, size: int) -> Iterator[tuple[str, int, int]]:
    """Path, first row and number of rows of every block."""
    import pyarrow.parquet as pq

    for path in reader.files:
        with reader.storage.open(path) as stream:
            total = pq.ParquetFile(stream).metadata.num_rows
        yield from ((path, first, min(size, total - first)) for first in range(0, total, size))


def _read_rows(task: _Task) -> pa.Table:
    import pyarrow.parquet as pq

    from flywheel_tasks.core.storage import Storage

    with Storage(task.conversations.store_uri).open(task.path) as stream:
        parquet = pq.ParquetFile(stream)
        groups, before, skipped = [], 0, None
        for group in range(parquet.metadata.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            if before < task.first + task.rows and before + rows > task.first:
                groups.append(group)
                skipped = before if skipped is None else skipped
            before += rows
        return parquet.read_row_groups(groups).slice(task.first - (skipped or 0), task.rows)


def _refuse_outage(outcome: dict[str, int], rows: int, most: float) -> None:
    failed = outcome.get("classifier_error", 0)
    if rows and failed / rows > most:
        raise FlywheelError(
            f"filter: {failed} of {rows} conversations could not be judged (classifier_error), more than "
            f"filter.most_unjudged = {most:g} allows: see whether the safety classifier is up, then run the stage again"
        )


STAGE = Stage(
    name="filter",
    phase="curation",
    paper="Sec. 2.2.1 Phase I, 2.6",
    inputs={"conversations": Input("ingest", "conversations")},
    outputs={"conversations": "conversation", "prompts": "prompt", "report": "json"},
    config=FilterConfig,
    run=run,
    resources=Resources(cpus=2, memory_gib=4),
    models=("safety.weights", "safety.guard_model", "privacy.token_model"),
    data=("curation/weights",),
)
