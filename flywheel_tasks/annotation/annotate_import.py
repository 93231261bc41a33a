"""annotate-import: what annotators have sent so far becomes annotations, preferences and examples (Sec. 2.2.2, 3.4.1).

It never waits. Reviews of any earlier cycle's tasks are welcome, because the export's ledger holds them all. What an
earlier import accepted is carried on, so a delivery may be moved away once it was read; bytes that were read before are
read again only where that may change something: under another batch or ending, where no line found its pair, and once
more where a classifier failed. A review never counts twice. Then every preference is decided anew from all reviews: a
late one can still tip a pair.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from flywheel_tasks.annotation.collect import LABELS, Collected, Rule, ballots, collect
from flywheel_tasks.annotation.contract import questions_of
from flywheel_tasks.annotation.delivery import Line, lines, read_as
from flywheel_tasks.annotation.resolve import CARRIED, Resolved, resolve, settle
from flywheel_tasks.core import ids, schemas
from flywheel_tasks.core.config import Operational, StageConfig
from flywheel_tasks.core.manifest import SourceRecord
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.quarantine import of_others, without
from flywheel_tasks.core.stage import Input, Inputs, Resources, Stage
from flywheel_tasks.core.storage import open_external

_KNOWN = ["task_id", "pair_id", "user", "mode", "left", "digest", "cycle"]
"""What a review is checked against; the texts stay in the table."""
ID = pa.string()


class ImportConfig(StageConfig):
    deliveries: tuple[str, ...] = Field(
        (),
        description="globs of deliveries: YYMMDD-….jsonl of our contract, YYMMDD-….json exported by Label Studio",
        json_schema_extra=Operational,
    )
    agreement: Rule = Field(
        "majority", description="how reviews become one preference: unanimous, majority, or a single one at random"
    )
    fewest_reviews: int = Field(1, ge=1, le=99, description="a pair with fewer reviews waits for more")
    leave_out: tuple[Literal["position", "fast", "drift", "disagrees"], ...] = Field(
        (), description="flags whose annotators do not vote; their reviews are kept, and the report names them anyway"
    )
    most_turns: int = Field(8, ge=1, le=64, description="user turns after which an interactive session ends")

    @field_validator("deliveries", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


def run(inputs: Inputs, config: ImportConfig, out: Output) -> None:
    """Read the deliveries that are there, refuse what is broken, altered, unknown or said before, each with file, line
    and reason, and decide each reviewed pair: unanimous, majority or single, the conflict kept. Rewrites become
    examples and interactive sessions go on as prompts where the filter lets the words pass; the report says how far
    annotators agree and who stands out."""
    from flywheel_tasks.annotation import sessions, words
    from flywheel_tasks.annotation.reviewers import excluded, reviewers

    key = ids.user_key()
    ledger = of_others(inputs["tasks"].read(), inputs.forgotten)
    tasks = {row["task_id"]: row for row in ledger.select(_KNOWN).to_pylist()}
    questions = questions_of(inputs.json("export"))
    earlier = inputs.get("earlier")
    everything = earlier.read() if earlier else schemas.get("annotation").empty_table()
    before, forgotten = without(everything, inputs.forgotten, "annotation_id")
    said_before = inputs.json("earlier_report") or {}
    read_before = dict(said_before.get("files", {}))
    contradicted = {name: datetime.fromisoformat(at) for name, at in said_before.get("contradicted", {}).items()}
    fresh = [record for record in inputs.sources.get("deliveries", ()) if _reading(record) not in read_before]
    arrived: list[Line] = [line for record in fresh for line in lines(record.name, _content(record), out.cycle)]
    written = [resolve(line, tasks, questions, key) for line in arrived]
    resolved, unfit = words.filtered(written, ledger, words.rules(inputs), out.seed)
    known = pc.is_in(before["pair_id"], ledger["pair_id"])
    again = pc.is_in(before["annotation_id"], pa.array([one.row["annotation_id"] for one in resolved if one.row], ID))
    met = before.filter(pc.and_(known, again)).to_pylist()
    gone = before.filter(pc.invert(known)).select(["annotation_id", "user"]).to_pylist()
    carried_on = (Resolved(CARRIED, row, user=row["user"]) for row in met)
    settled, refused, contradicted = settle([*carried_on, *resolved], contradicted)
    refused += [Resolved(CARRIED, row, reason="task_gone", user=row["user"]) for row in gone]
    rows = pa.Table.from_pylist([one.row for one in settled], schema=schemas.get("annotation"))
    carried = before.filter(pc.and_(known, pc.invert(again)))
    annotations = pa.concat_tables([carried, rows]).sort_by("annotation_id")
    people = reviewers(annotations, ledger)
    silent = pa.array(excluded(people, config.leave_out), ID)
    voting = annotations.filter(pc.invert(pc.is_in(annotations["annotator"], silent)))
    collected = collect(voting, ledger, config.agreement, config.fewest_reviews, out.seed)
    examples = _examples(annotations, ledger)
    new = [one for one in settled if one.where != CARRIED]
    unjudged, unheard = words.unjudged(unfit), set(said_before.get("unheard", ()))
    heard = _heard(settled, resolved, unheard)
    going_on = {mode: _going_on([*new, *heard], mode, ledger, out.seed, config.most_turns) for mode in sessions.MODES}
    unheard -= _ids([*new, *heard])
    cut_off = _ids(one for one in new if one.next_message is None)
    unheard |= cut_off & _ids(one for one in unjudged if one.reason == words.UNHEARD)
    for name, table in {
        "annotations": annotations, "preferences": collected.preferences, "examples": examples, **going_on,
    }.items():  # fmt: skip
        with out.table(name) as writer:
            writer.write(table)
    out.reject(_quarantine(refused))
    out.reject(_quarantine(unfit))
    out.reject(forgotten)
    # Words that stay out are rows of their own: the review that they came with is counted where it went.
    rows_in = len(everything) + len(arrived) + len(unfit)
    out.account("review", rows_in=rows_in, rows_out=len(annotations))
    # What could be taken another time is not held as read; words that no classifier judges get one more try.
    in_part, found_pairs = _files(unjudged), _files(one for one in resolved if one.row)
    once_more = {_reading(record) for record in fresh if record.name in in_part} - set(said_before.get("once_more", ()))
    read = {_reading(record): record.name for record in fresh if record.name in found_pairs}
    files = read_before | {reading: name for reading, name in read.items() if reading not in once_more}
    out.json(
        "report",
        {
            "deliveries": {
                "read": len(fresh),
                "read_before": len(inputs.sources.get("deliveries", ())) - len(fresh),
                "reviews": len(arrived),
                "accepted": len(new),
                "refused": dict(sorted(Counter(one.reason for one in refused).items())),
                "of_earlier_cycles": _of_earlier_cycles(new, tasks, out.cycle),
            },
            "words_left_out": dict(sorted(Counter(one.reason for one in unfit).items())),
            "files": files,
            "once_more": sorted(once_more),
            "unheard": sorted(unheard),
            "contradicted": {name: at.isoformat() for name, at in sorted(contradicted.items())},
            "carried": len(before),
            **_report(annotations, ledger, collected, config),
            "sessions_going_on": {mode: len(table) for mode, table in going_on.items()},
            "examples": len(examples),
            "annotators": [person._asdict() for person in people],
        },
    )
    out.metric("reviews", len(annotations))
    out.metric("preferences", len(collected.preferences))


def _heard(settled: Iterable[Resolved], resolved: Iterable[Resolved], unheard: set[str]) -> list[Resolved]:
    """Earlier reviews whose next message no classifier could judge when it came, with the message as it is now."""
    said = {one.row["annotation_id"]: one.next_message for one in resolved if one.row and one.next_message}
    earlier = ((one, one.row["annotation_id"]) for one in settled if one.row and one.where == CARRIED)
    return [one._replace(next_message=said[name]) for one, name in earlier if name in unheard and name in said]


def _ids(found: Iterable[Resolved]) -> set[str]:
    return {one.row["annotation_id"] for one in found if one.row}


def _files(found: Iterable[Resolved]) -> set[str]:
    """The deliveries that these came in."""
    return {one.where.rpartition(":")[0] for one in found}


def _report(annotations: pa.Table, ledger: pa.Table, collected: Collected, config: ImportConfig) -> dict[str, Any]:
    """Agreement over all, by mode and by batch; what was decided, and what still waits."""
    from flywheel_tasks.annotation.agreement import agreement

    def of(some: pa.Table) -> dict[str, Any]:
        return agreement(ballots(some, ledger)[0].table)._asdict()

    def by(column: str) -> dict[str, Any]:
        return {
            value: of(annotations.filter(pc.equal(annotations[column], value)))
            for value in sorted(annotations[column].unique().to_pylist())
        }

    votes, tasks = ballots(annotations, ledger)
    sizes = votes.table.sum(axis=1)
    wanted = tasks["reviewers"].to_numpy()
    return {
        "rule": config.agreement,
        "preferences": len(collected.preferences),
        "by_agreement": dict(sorted(Counter(collected.preferences["agreement"].to_pylist()).items())),
        "conflicts_kept": int(pc.sum(collected.preferences["conflict"]).as_py() or 0),
        "undecided": collected.undecided,
        "labels": dict(zip(LABELS, votes.table.sum(axis=0).tolist(), strict=True)),
        "tasks": {
            "out": len(ledger),
            "without_review": len(ledger) - len(tasks),
            "partly_reviewed": int((sizes < wanted).sum()),
            "reviewed": int((sizes >= wanted).sum()),
            "beyond_wanted": int(np.maximum(sizes - wanted, 0).sum()),
        },
        "agreement": of(annotations),
        "agreement_by_mode": by("mode"),
        "agreement_by_batch": by("batch"),
        "rewrites_missing": _rewrites_missing(annotations),
    }


def _rewrites_missing(annotations: pa.Table) -> int:
    """Steerability reviews that found both responses in violation and gave no rewrite, which Sec. 2.2.2 asks for."""
    steered = annotations.filter(pc.equal(annotations["mode"], "steerability")).select(["questions", "rewrite"])
    both = [
        row for row in steered.to_pylist()
        if {q["about"] for q in row["questions"] if q["name"] == "violation" and q["answer"] == "yes"} >= {"y0", "y1"}
    ]  # fmt: skip
    return sum(row["rewrite"] is None for row in both)


def _examples(annotations: pa.Table, ledger: pa.Table) -> pa.Table:
    """Rewrites as SFT rows of the bucket for failure modes (Sec. 2.4.2): they answer a response that failed. The two
    RJS buckets hold responses of a model that a reward model chose; a person's rewrite is neither. A held-out prompt
    gives none: it must not be trained on by way of its rewrite."""
    rewritten = annotations.filter(pc.is_valid(annotations["rewrite"])).select(["annotation_id", "pair_id", "rewrite"])
    pairs = _pairs(ledger.filter(pc.equal(ledger["split"], "train")), rewritten["pair_id"])
    rows = []
    for row in rewritten.to_pylist():
        if pair := pairs.get(row["pair_id"]):
            said = [{"role": t["role"], "content": t["content"], "trained": False} for t in pair["turns"]]
            rows.append(
                {
                    "example_id": hashlib.sha256(f"rewrite\0{row['annotation_id']}".encode()).hexdigest()[:32],
                    "user": pair["user"],
                    "source": "failure_fix",
                    "character_id": pair["character_id"],
                    "locale": pair["locale"],
                    "messages": [*said, {"role": "assistant", "content": row["rewrite"], "trained": True}],
                }
            )
    return pa.Table.from_pylist(rows, schema=schemas.EXAMPLE)


def _going_on(new: Iterable[Any], mode: str, ledger: pa.Table, seed: int, most: int) -> pa.Table:
    from flywheel_tasks.annotation import sessions

    said = [one for one in new if one.next_message and one.row["mode"] == mode]
    pairs = _pairs(ledger, pa.array([one.row["pair_id"] for one in said], ID))
    return sessions.prompts(
        sessions.next_prompt(pairs[one.row["pair_id"]], one.row["annotator"], one.next_message, seed, most)
        for one in said
    )


def _pairs(ledger: pa.Table, wanted: pa.Array) -> dict[str, dict[str, Any]]:
    """Whole rows of a few pairs."""
    if isinstance(wanted, pa.ChunkedArray):
        wanted = wanted.combine_chunks()
    return {row["pair_id"]: row for row in ledger.filter(pc.is_in(ledger["pair_id"], wanted)).to_pylist()}


def _of_earlier_cycles(new: Iterable[Any], tasks: Mapping[str, Mapping[str, Any]], cycle: str) -> int:
    sent = {task["pair_id"]: task["cycle"] for task in tasks.values()}
    return sum(sent[one.row["pair_id"]] < cycle for one in new)


def _reading(record: SourceRecord) -> str:
    """What a file's lines come to depends on its name's batch and ending too."""
    return f"{record.sha256} {read_as(record.name)}"


def _content(record: SourceRecord) -> bytes:
    with open_external(record.uri) as stream:
        return stream.read()


def _quarantine(refused: Iterable[Any]) -> pa.Table:
    """A refused line keeps its place and its reason, never its words: what a person wrote may name somebody."""
    rows = [
        {"row_id": one.row["annotation_id"] if one.row else one.where, "reason": one.reason, "where": one.where,
         "user": one.user}
        for one in refused
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=schemas.QUARANTINE)


STAGE = Stage(
    name="annotate-import",
    phase="annotation",
    paper="Sec. 2.2.2, 3.4.1, Table 9",
    inputs={
        "tasks": Input("annotate-export", "tasks"),
        "export": Input("annotate-export", "report"),
        "filter": Input("filter", "report", optional=True),
        "earlier": Input("annotate-import", "annotations", optional=True, previous=True),
        "earlier_report": Input("annotate-import", "report", optional=True, previous=True),
    },
    sources=("deliveries",),
    may_be_empty=("deliveries",),
    outputs={
        "annotations": "annotation",
        "preferences": "preference",
        "examples": "example",
        "interactive": "prompt",
        "steerability": "prompt",
        "report": "json",
    },
    config=ImportConfig,
    run=run,
    resources=Resources(memory_gib=4),
    uses_user_key=True,
    uses_cycle=True,
    data=("curation/weights",),
)
