"""A small world for annotation: prompts about the demo personas, pairs of scripted responses, stages in a throwaway
store, and the way of a task out to annotators and back."""

from __future__ import annotations

import datetime as dt
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from flywheel_tasks.annotation import annotate_export, annotate_import, pairing, publish
from flywheel_tasks.annotation.annotate_export import ExportConfig
from flywheel_tasks.annotation.annotate_import import ImportConfig
from flywheel_tasks.annotation.contract import Review, Task
from flywheel_tasks.core import schemas
from flywheel_tasks.core.config import StageConfig
from flywheel_tasks.core.manifest import Manifest, SourceRecord
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.stage import Inputs, Stage
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.simulation import language
from flywheel_tasks.simulation.characters import character_table, demo_characters
from flywheel_tasks.simulation.users import Turn

DAY = dt.date(2026, 11, 18)
CHARACTERS = character_table(demo_characters())
_ATTEMPTS = itertools.count()


def prompts(count: int, seed: int = 0) -> pa.Table:
    """Curated prompts, each of another user, with one to three user turns."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        character = demo_characters()[int(rng.integers(len(demo_characters())))]
        turns = [Turn("user", language.opening(rng, character, "en", "smalltalk"))]
        for _ in range(int(rng.integers(3))):
            context = language.Context(f"c{i}", character, "en", tuple(turns), int(rng.integers(2**31)))
            turns.append(Turn("assistant", language.scripted_policy(0.6)([context])[0]))
            turns.append(Turn("user", language.follow_up(rng, character, "en", turns[-2].content)))
        digest = hashlib.sha256(f"{seed} {i}".encode()).hexdigest()
        rows.append(
            {
                "prompt_id": f"{digest[:32]}.{len(turns) - 1}", "conversation_id": digest[:32], "user": digest[32:],
                "character_id": character.character_id, "source": "internal" if i % 5 == 0 else "production",
                "turns": [turn._asdict() for turn in turns], "turn_index": len(turns) - 1,
                "first_turn": len(turns) == 1, "locale": "en_US", "language": "en", "code_mixed": False,
                "jtbd": "smalltalk", "depth": "first" if len(turns) == 1 else "short", "quality": None,
                "difficulty": None, "model_version": "V1", "near_policy": True,
                "split": "eval" if i % 10 == 9 else "train",
            }
        )  # fmt: skip
    return pa.Table.from_pylist(rows, schema=schemas.PROMPT)


def plan(table: pa.Table, modes: Mapping[str, float] | None = None, seed: int = 17) -> pairing.Plan:
    return pairing.plan(
        table, {}, count=len(table), pool=2, kinds=(), rewrite_share=0.0, modes=modes or {"static": 1.0}, seed=seed
    )


def pairs(count: int, seed: int = 0, modes: Mapping[str, float] | None = None) -> pa.Table:
    """Pairs of a good and a poor scripted policy, within the style bounds."""
    planned = plan(prompts(count, seed), modes)
    made: list[list[pairing.Made]] = [[], []]
    for row, first in zip(planned.prompts.to_pylist(), planned.first.tolist(), strict=True):
        character = next(c for c in demo_characters() if c.character_id == row["character_id"])
        turns = tuple(Turn(t["role"], t["content"]) for t in row["turns"])
        for slot, quality in ((first, 0.95), (1 - first, 0.35)):
            context = language.Context(row["prompt_id"], character, "en", turns, slot + 5)
            text = language.scripted_policy(quality)([context])[0]
            made[slot if first == 0 else 1 - slot].append(pairing.Made(text, f"policy-of-quality-{quality}"))
    bounds = pairing.Bounds(words=100, emoji=9, list_items=9, markdown=9)
    table, reasons = pairing.assemble(planned, made[0], made[1], bounds)
    return table.filter(pa.compute.is_null(reasons))


LENIENT: dict[str, Any] = {"privacy": {"presidio": []}, "safety": {"threshold": 0.9}}
"""A filter for simulated talk: at its own threshold the embedded classifier flags one harmless turn in ten."""


class World:
    """Cycles of annotate-export and annotate-import in one store, with an outbox and an inbox of files."""

    def __init__(
        self,
        folder: Path,
        config: ImportConfig | None = None,
        rules: Mapping[str, Any] = LENIENT,
        **export: Any,
    ) -> None:
        self.store = Store(str(folder / "store"))
        self.outbox, self.inbox = folder / "outbox", folder / "inbox"
        self.export_config = ExportConfig(folder=str(self.outbox), **export)
        self.import_config = config or ImportConfig()
        self.characters = self.put("ingest", {"characters": "character"}, {"characters": CHARACTERS})
        self.filter = self.filtered_by(rules)
        self.exports: list[Artifact] = []
        self.imports: list[Artifact] = []

    def export(self, table: pa.Table, cycle: str, forgotten: frozenset[str] = frozenset()) -> Artifact:
        given = {
            "pairs": (self.put("pairs", {"pairs": "pair"}, {"pairs": table}), "pairs"),
            "characters": (self.characters, "characters"),
            "earlier": (self.exports[-1], "tasks") if self.exports else None,
        }
        self.exports.append(run(annotate_export.STAGE, self.store, self.export_config, given, cycle, {}, forgotten))
        return self.exports[-1]

    def collect(
        self, cycle: str, files: Sequence[Path] | None = None, forgotten: frozenset[str] = frozenset()
    ) -> Artifact:
        """Import the given deliveries, or all that lie in the inbox."""
        found = sorted(self.inbox.glob("*")) if files is None else files
        given = {
            "tasks": (self.exports[-1], "tasks"),
            "export": (self.exports[-1], "report"),
            "filter": (self.filter, "report"),
            "earlier": (self.imports[-1], "annotations") if self.imports else None,
            "earlier_report": (self.imports[-1], "report") if self.imports else None,
        }
        sources = {"deliveries": tuple(source(path) for path in found)}
        self.imports.append(
            run(annotate_import.STAGE, self.store, self.import_config, given, cycle, sources, forgotten)
        )
        return self.imports[-1]

    def tasks(self) -> list[Task]:
        """The tasks of the newest export, from its folder."""
        name = self.exports[-1].json("report")["export"]
        return publish.tasks(publish.read(str(self.outbox), name)["tasks.jsonl"])

    def filtered_by(self, config: Mapping[str, Any]) -> Artifact:
        """What the week's filter leaves behind: its rules."""

        def fill(out: Output) -> None:
            out.json("report", {})

        return commit(self.store, "filter", {"report": "json"}, fill, "2026-W01", config=config)

    def put(self, stage: str, contracts: Mapping[str, str], tables: Mapping[str, pa.Table]) -> Artifact:
        def fill(out: Output) -> None:
            for name, table in tables.items():
                with out.table(name) as writer:
                    writer.write(table)
            rows = sum(map(len, tables.values()))
            out.account("row", rows_in=rows, rows_out=rows)

        return commit(self.store, stage, contracts, fill, "2026-W01")


def source(path: Path) -> SourceRecord:
    content = path.read_bytes()
    return SourceRecord(name=path.name, uri=str(path), bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def run(
    stage: Stage,
    store: Store,
    config: StageConfig,
    given: Mapping[str, tuple[Artifact, str] | None],
    cycle: str,
    sources: Mapping[str, tuple[SourceRecord, ...]],
    forgotten: frozenset[str] = frozenset(),
) -> Artifact:
    inputs = Inputs(given, sources, forgotten)
    return commit(store, stage.name, stage.outputs, lambda out: stage.run(inputs, config, out), cycle)


def commit(store: Store, stage: str, contracts: Mapping[str, str], fill: Any, cycle: str, **made_from: Any) -> Artifact:
    """Commit what `fill` writes; `made_from` is `inputs` or `config` of the manifest."""
    key = hashlib.sha256(f"{stage} {next(_ATTEMPTS)}".encode()).hexdigest()[:32]
    out = Output(store.storage, stage, key, f"attempt-{key[:8]}", contracts, seed=17, cycle=cycle)
    now = dt.datetime.now(dt.UTC)
    try:
        fill(out)
        record = Manifest(
            stage=stage, key=key, cycle=cycle, attempt=f"attempt-{key[:8]}", sources=(),
            outputs=out.finish(), rows=out.rows, code_version="0" * 16, commit="", environment={},
            started=now, finished=now, metrics={name: value for name, value, _ in out.metrics},
            **({"inputs": {}, "config": {}} | made_from),
        )  # fmt: skip
        return store.commit(record)[0]
    finally:
        out.close()


def quarantine(artifact: Artifact) -> list[dict[str, Any]]:
    """The refused rows of an artifact."""
    if "quarantine" not in artifact.manifest.outputs:
        return []
    return artifact.table("quarantine").read().to_pylist()


def line(task: Task, annotator: str = "ann", preferred: str = "left", **other: Any) -> Review:
    """A complete review of a task, by hand."""
    answers = [
        {"question": q.name, "about": about, "answer": q.answers[0]}
        for q in task.questions
        for about in (("pair",) if q.about == "pair" else ("left", "right"))
    ]
    plain: dict[str, Any] = {
        "task_id": task.task_id, "digest": task.digest, "annotator": annotator, "preferred": preferred,
        "answers": answers, "at": dt.datetime(2026, 11, 18, 9, tzinfo=dt.UTC), "seconds": 20.0,
    }  # fmt: skip
    return Review.model_validate(plain | other)


def write(folder: Path, name: str, rows: Sequence[Review], **how: Any) -> Path:
    """A delivery file; `how` has `head`, `newline`."""
    folder.mkdir(parents=True, exist_ok=True)
    newline = how.get("newline", b"\n")
    body = b"".join(row.model_dump_json(exclude_none=True).encode() + newline for row in rows)
    (folder / name).write_bytes(how.get("head", b"") + body)
    return folder / name
