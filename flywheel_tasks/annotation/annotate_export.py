"""annotate-export: this week's pairs leave for people to judge (Sec. 2.2.2), and the ledger remembers what left.

The prose goes to a folder outside the store, because `forget` could not purge it there; the store keeps the ledger of
every task ever sent, pair, order and digest included, which is purged by user and lets a late review find its pair.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
from pydantic import Field, field_validator

from flywheel_tasks.annotation import contract
from flywheel_tasks.annotation.contract import Character, Mode, Question, Task
from flywheel_tasks.core import ids, schemas
from flywheel_tasks.core.config import StageConfig
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.quarantine import without
from flywheel_tasks.core.stage import Input, Inputs, Resources, Stage
from flywheel_tasks.curation.privacy import identifiers, mask


class ExportConfig(StageConfig):
    folder: str = Field(
        "",
        description="where export folders go: a path, s3:// or gs:// (empty: only the ledger is written)",
    )
    reviewers: dict[Mode, int] = Field(
        {"static": 3, "interactive": 1, "steerability": 1, "image": 3},
        description="different people who judge a pair, by mode; image pairs are multi-review (Sec. 2.7)",
    )
    questions: tuple[Question, ...] = Field((), description="questions asked beside the package's own")

    @field_validator("reviewers")
    @classmethod
    def _enough(cls, value: dict[str, int]) -> dict[str, int]:
        if missing := [mode for mode in schemas.MODES if not 1 <= value.get(mode, 0) <= 99]:
            raise ValueError(f"'{missing[0]}' needs a number of reviewers from 1 to 99")
        if value["image"] < 2:
            raise ValueError("image pairs need at least 2 reviewers: Sec. 2.7 mandates agreement on two dimensions")
        return value

    @field_validator("questions")
    @classmethod
    def _new_names(cls, value: tuple[Question, ...]) -> tuple[Question, ...]:
        names = Counter(question.name for question in (*contract.core_questions(), *value))
        if twice := [name for name, number in names.items() if number > 1]:
            raise ValueError(f"question '{twice[0]}' is there already: give yours another name")
        return value


def run(inputs: Inputs, config: ExportConfig, out: Output) -> None:
    """Send this cycle's new pairs to annotators: tasks that name nobody, with left and right drawn by a keyed coin, as
    JSON Lines with their JSON Schema and as Label Studio projects. The ledger holds these and all earlier tasks."""
    pairs, forgotten = without(inputs["pairs"].read(), inputs.forgotten, "pair_id")
    send(pairs, forgotten, inputs, config, out, {})


def send(
    pairs: pa.Table, left_out: pa.Table, inputs: Inputs, config: ExportConfig, out: Output, about: Mapping[str, Any]
) -> None:
    """Tasks for these pairs, in a sealed folder and in the ledger. `left_out` (quarantine rows of pairs that may not go
    out) is accounted for; `about` joins the report."""
    from flywheel_tasks.annotation import label_studio, publish

    earlier = inputs.get("earlier")
    before = earlier.read() if earlier else schemas.get("task").empty_table()
    ledger, forgotten = without(before, inputs.forgotten, "task_id")
    questions = (*contract.core_questions(), *config.questions)
    new, tasks, refused = make_tasks(
        pairs, characters(inputs["characters"].read()), ledger["pair_id"].to_pylist(),
        reviewers=config.reviewers, questions=questions, cycle=out.cycle, seed=out.seed, key=ids.user_key(),
    )  # fmt: skip
    files = {
        "tasks.jsonl": publish.task_lines(tasks),
        **{f"{name}.schema.json": contract.schema_text(name).encode() for name in contract.CONTRACTS},
        "CONTRACT.md": contract.page().encode(),
        **label_studio.export(tasks),
    }
    name, _ = publish.seal(out.cycle, files)
    if config.folder:
        publish.publish(config.folder, out.cycle, files)
    with out.table("tasks") as writer:
        writer.write(ledger)
        writer.write(new)
    for rejected in (left_out, forgotten, refused):
        out.reject(rejected)
    rows_in = len(before) + len(pairs) + len(left_out)
    out.account("pair", rows_in=rows_in, rows_out=len(ledger) + len(new))
    out.json(
        "report",
        {
            "export": name,
            "tasks": len(new),
            "reviews_wanted": sum(new["reviewers"].to_pylist()),
            "by_mode": dict(sorted(Counter(new["mode"].to_pylist()).items())),
            "first_response_left": sum(side == "y0" for side in new["left"].to_pylist()),
            "tasks_of_earlier_cycles": len(ledger),
            "published": bool(config.folder),
            "questions": [question.model_dump(mode="json") for question in questions],
            **about,
        },
    )


def characters(table: pa.Table) -> dict[str, Character]:
    """Character id → what annotators may see. A character's author may have written a phone number into it."""
    return {
        row["character_id"]: Character(
            name=_masked(row["name"]),
            description=_masked(row["description"]),
            traits=tuple(_masked(trait) for trait in row["traits"]),
            instructions=_masked(row["instructions"]),
        )
        for row in table.to_pylist()
    }


def make_tasks(
    pairs: pa.Table,
    known_characters: Mapping[str, Character],
    known_pairs: Iterable[str],
    *,
    reviewers: Mapping[Mode, int],
    questions: tuple[Question, ...],
    cycle: str,
    seed: int,
    key: bytes,
) -> tuple[pa.Table, list[Task], pa.Table]:
    """The ledger's new rows, the tasks as annotators get them (in another order), and the pairs that stay."""
    seen = set(known_pairs)
    rows: list[dict[str, Any]] = []
    tasks: list[Task] = []
    refused: list[dict[str, Any]] = []
    for row in pairs.to_pylist():
        character = known_characters.get(row["character_id"])
        reason = "already_exported" if row["pair_id"] in seen else None if character else "unknown_character"
        if reason or character is None:
            where = f"pairs:{row['pair_id']}"
            refused.append({"row_id": row["pair_id"], "reason": reason, "where": where, "user": row["user"]})
            continue
        seen.add(row["pair_id"])
        at_left = contract.left(row["pair_id"], seed, key)
        shown = contract.shown(row, character, at_left)
        task = Task(
            task_id=contract.task_id(row["pair_id"], key), mode=row["mode"], reviewers=reviewers[row["mode"]],
            locale=row["locale"], language=row["language"], shown=shown,
            questions=contract.asked(questions, row["mode"]), digest=contract.digest(shown),
        )  # fmt: skip
        tasks.append(task)
        own = {"task_id": task.task_id, "cycle": cycle, "left": at_left, "digest": task.digest}
        rows.append(row | own | {"reviewers": task.reviewers})
    # In the order of keyed ids the file says nothing about the order of traffic.
    tasks.sort(key=lambda task: task.task_id)
    ledger = pa.Table.from_pylist(rows, schema=schemas.get("task"))
    return ledger, tasks, pa.Table.from_pylist(refused, schema=schemas.QUARANTINE)


def _masked(text: str) -> str:
    return mask(text, identifiers(text))


STAGE = Stage(
    name="annotate-export",
    phase="annotation",
    paper="Sec. 2.2.2",
    inputs={
        "pairs": Input("pairs", "pairs"),
        "characters": Input("ingest", "characters"),
        "earlier": Input("annotate-export", "tasks", optional=True, previous=True),
    },
    outputs={"tasks": "task", "report": "json"},
    config=ExportConfig,
    run=run,
    resources=Resources(memory_gib=4),
    uses_user_key=True,
    uses_cycle=True,
    data=("annotation/questions.yaml", "annotation/CONTRACT.md"),
)
