"""metrics: how the responses of candidate, champion and checkpoints look (Sec. 2.5.1, Tables 4 and 7, Figure 10)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from flywheel_tasks.core import schemas
from flywheel_tasks.core.config import StageConfig
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.quarantine import FORGOTTEN
from flywheel_tasks.core.stage import Input, Inputs, Resources, Stage
from flywheel_tasks.curation.language import LanguageConfig
from flywheel_tasks.evaluation.judge import JudgeConfig
from flywheel_tasks.evaluation.versus import CANDIDATE, CHAMPION
from flywheel_tasks.style.monitor import StyleConfig

if TYPE_CHECKING:
    from flywheel_tasks.evaluation.agreement import Agreement
    from flywheel_tasks.evaluation.judge import Judged
    from flywheel_tasks.evaluation.rubric import Item
    from flywheel_tasks.evaluation.table4 import FloatArray, Responses

TRAINED = ("sft", "dpo", CANDIDATE)
"""The policies of one cycle in the order in which they are trained."""
_PIECE = "judgements-"


class MetricsConfig(StageConfig):
    judge: JudgeConfig = Field(JudgeConfig(), description="who judges what rules can't")
    labelled: tuple[str, ...] = Field(
        (), description="globs of JSONL files with people's labels, on which an http or vllm judge is measured: rows "
        "of metric, response, label, turns, card; without any its metrics can't gate",
    )  # fmt: skip
    style: StyleConfig = Field(StyleConfig(), description="the style monitor's bounds")
    language: LanguageConfig = Field(LanguageConfig(), description="how the language of a response is told")


def run(inputs: Inputs, config: MetricsConfig, out: Output) -> None:
    """Table 4's metrics, language match and Table 7's failure rates of every policy that answered, each with its
    interval and the number of responses it rests on; how far the judge agrees with people; and which style features
    moved between candidate and champion and from one training stage to the next."""
    from flywheel_tasks.evaluation import table4
    from flywheel_tasks.evaluation.judge import refuse_outage

    everything = inputs["responses"].read()
    rejected, answered = _split(everything, inputs.forgotten)
    policies = sorted(set(answered["policy"].to_pylist()) | set(rejected["policy"].to_pylist()))
    source_of = _sources(inputs)
    judged, agreement = _judge(answered, inputs, config, out)
    belief = table4.Judgement(config.judge.name(), agreement, config.judge.least_agreement, config.judge.most_missing)
    report: dict[str, dict[str, Any]] = {}
    measured: dict[str, tuple[Responses, dict[str, FloatArray]]] = {}
    by_policy = np.asarray(answered["policy"].to_pylist(), object)
    for policy in policies:
        rows = np.flatnonzero(by_policy == policy)
        failed = int(pc.sum(pc.equal(rejected["policy"], policy)).as_py() or 0)
        responses = _responses(answered.take(pa.array(rows)), source_of, config.language, failed)
        for name in np.unique(responses.prompt_set):
            these = rows[responses.prompt_set == name].tolist()
            refuse_outage(judged, these, f"responses of the {policy} to {name or 'other'} prompts", config.judge)
        columns = table4.rule_columns(responses)
        columns |= table4.judge_columns([judged.verdicts[row] for row in rows], _judged_names(judged))
        report[policy] = table4.values(responses, columns, belief, out.seed)
        report[policy]["failed_responses"] = _failed(len(rows), failed)
        measured[policy] = responses, columns
    out.json("metrics", _report(report, config, agreement, judged))
    out.json("style", _style({name: found[0] for name, found in measured.items()}, config.style, out))
    out.json("judgements", {"judge": config.judge.name(), "answers": judged.judgements})
    _write_scored(measured, rejected, everything.num_rows, out)
    for policy, found in report.items():
        for name, body in found.items():
            if body["value"] is not None:
                out.metric(f"{policy}.{name}", body["value"])


def _split(responses: pa.Table, forgotten: frozenset[str]) -> tuple[pa.Table, pa.Table]:
    """Responses that never came about, or whose user asked to be forgotten; and the others."""
    gone = pc.is_in(responses["user"], pa.array(sorted(forgotten), pa.string()))
    out = pc.or_(pc.equal(responses["finish"], "error"), gone)
    reason = pc.if_else(gone, FORGOTTEN, pc.fill_null(responses["reason"], "error"))
    index = responses.schema.get_field_index("reason")
    named = responses.set_column(index, responses.schema.field("reason"), reason)
    return named.filter(out), responses.filter(pc.invert(out)).combine_chunks()


def _sources(inputs: Inputs) -> dict[str, str]:
    """Prompt id → the source of its traffic."""
    prompts = inputs["prompts"].read(["prompt_id", "source"])
    return dict(zip(prompts["prompt_id"].to_pylist(), prompts["source"].to_pylist(), strict=True))


def _responses(table: pa.Table, source_of: Mapping[str, str], language: LanguageConfig, failed: int) -> Responses:
    from flywheel_tasks.curation.language import UNDETERMINED, detect
    from flywheel_tasks.evaluation.table4 import SOURCES, Responses
    from flywheel_tasks.style.features import last_user_turn

    sets = [SOURCES.get(source_of.get(prompt, ""), "") for prompt in table["prompt_id"].to_pylist()]
    said = detect(table["text"].combine_chunks(), language).language
    asked = detect(last_user_turn(table["turns"]), language).language
    # A last turn too short to tell is in the language of its conversation.
    known = np.asarray(table["language"].fill_null(UNDETERMINED).to_pylist(), object)
    wanted = np.where(asked == UNDETERMINED, known, asked) if len(known) else asked
    spoken, meant = (pa.array([str(tag) for tag in column], pa.string()) for column in (said, wanted))
    return Responses(table, np.asarray(sets, dtype=np.str_), spoken, meant, failed)


def _judge(
    answered: pa.Table, inputs: Inputs, config: MetricsConfig, out: Output
) -> tuple[Judged, dict[str, Agreement]]:
    """Every response judged once, and the same judge on people's labels."""
    from flywheel_tasks.core.storage import open_external
    from flywheel_tasks.evaluation import agreement
    from flywheel_tasks.evaluation.judge import judge, refuse_outage

    labelled: list[agreement.LabelledItem] = []
    for source in inputs.sources.get("labelled", ()):
        with open_external(source.uri) as stream:
            lines = stream.read().decode("utf-8-sig").splitlines()
        labelled += agreement.read_labelled(lines, source.name)
    items = _items(answered, inputs)
    known = _known(inputs, out)
    everything = [*items, *(each.item for each in labelled)]
    judged = judge(
        everything, config.judge, known, _remember(out), progress=lambda n, of: out.progress(n, of, "judged")
    )
    on_labels = judged._replace(verdicts=judged.verdicts[len(items) :])
    refuse_outage(judged, range(len(items), len(everything)), "responses that people labelled", config.judge)
    found = agreement.measured(labelled, on_labels, out.seed) if labelled else {}
    if config.judge.kind == "rules":
        found = agreement.embedded() | found
    return judged._replace(verdicts=judged.verdicts[: len(items)]), found


def _items(answered: pa.Table, inputs: Inputs) -> list[Item]:
    from flywheel_tasks.evaluation.rubric import Item
    from flywheel_tasks.models.chat import Card

    characters = inputs.get("characters")
    cards = {row["character_id"]: Card.of(row).system for row in characters.read().to_pylist()} if characters else {}
    columns = (answered[name].to_pylist() for name in ("character_id", "turns", "text"))
    return [
        Item(cards.get(character, ""), tuple((turn["role"], turn["content"]) for turn in turns), text)
        for character, turns, text in zip(*columns, strict=True)
    ]


def _known(inputs: Inputs, out: Output) -> dict[str, dict[str, str]]:
    """Judgements of the last cycle, and of an attempt at this artifact that did not live to the end."""
    earlier = inputs.json("earlier")
    known: dict[str, dict[str, str]] = dict(earlier["answers"]) if earlier else {}
    for name in out.partial.names():
        if name.startswith(_PIECE) and (data := out.partial.get(name)):
            known |= json.loads(data)
    return known


def _remember(out: Output) -> Callable[[dict[str, dict[str, str]]], None]:
    taken = sum(name.startswith(_PIECE) for name in out.partial.names())
    number = iter(range(taken, 1 << 31))

    def remember(new: dict[str, dict[str, str]]) -> None:
        out.partial.put(f"{_PIECE}{next(number):05d}", json.dumps(new).encode())

    return remember


def _judged_names(judged: Judged) -> list[str]:
    return sorted({name for verdict in judged.verdicts if verdict for name in verdict})


def _failed(answered: int, failed: int) -> dict[str, Any]:
    """Responses that never came: the other metrics don't see them."""
    from flywheel_tasks.stats.winrate import wilson

    total = answered + failed
    body: dict[str, Any] = {"set": "all", "by": "rule", "unit": "share", "n": total}
    if not total:
        return body | {"value": None, "low": None, "high": None, "why": "no response"}
    low, high = wilson(failed / total, total)
    value = failed / total
    return body | {"value": value, "low": min(low, value), "high": max(high, value), "can_gate": True}


def _report(
    report: dict[str, dict[str, Any]], config: MetricsConfig, agreement: Mapping[str, Agreement], judged: Judged
) -> dict[str, Any]:
    from flywheel_tasks.evaluation.agreement import as_json
    from flywheel_tasks.evaluation.rubric import digest

    return {
        "policies": report,
        "judge": {
            "name": config.judge.name(), "rubric": digest(), "agreement": as_json(agreement),
            "least_agreement": config.judge.least_agreement, "missing": dict(sorted(judged.missing.items())),
            "judgements": len(judged.judgements),
        },
    }  # fmt: skip


def _style(answers: Mapping[str, Responses], config: StyleConfig, out: Output) -> dict[str, Any]:
    """Candidate against champion, and each training stage against the one before it (Sec. 2.4.4)."""
    from flywheel_tasks.style import monitor

    tables = {
        name: one.table.append_column("spoken", one.language).append_column("wanted", one.wanted)
        for name, one in answers.items()
    }
    comparisons = []
    if {CANDIDATE, CHAMPION} <= set(tables):
        comparisons.append(monitor.between(tables[CANDIDATE], tables[CHAMPION], CANDIDATE, CHAMPION, config))
    trained = {name: tables[name] for name in TRAINED if name in tables}
    comparisons += monitor.checkpoints(trained, config)
    alerts = monitor.alerts(comparisons)
    out.metric("style_alerts", len(alerts))
    for comparison in comparisons:
        for finding in comparison.findings:
            if finding.effect.size is not None:
                out.metric(f"style.{comparison.name}.{finding.name}", finding.effect.size)
    return {"comparisons": [comparison.as_json() for comparison in comparisons], "alerts": alerts}


def _write_scored(
    measured: Mapping[str, tuple[Responses, dict[str, FloatArray]]], rejected: pa.Table, rows_in: int, out: Output
) -> None:
    """Every response with what was measured of it."""
    written = 0
    with out.table("scored") as writer:
        for responses, columns in measured.values():
            table = responses.table
            names = [name for name in columns if not np.isnan(columns[name]).all()]
            scores = [
                [
                    {"name": name, "value": float(columns[name][row])}
                    for name in names
                    if not np.isnan(columns[name][row])
                ]
                for row in range(table.num_rows)
            ]
            field = schemas.COMPLETION.field("scores")
            index = table.schema.get_field_index("scores")
            writer.write(table.set_column(index, field, pa.array(scores, field.type)))
            written += table.num_rows
    out.reject(_quarantine(rejected))
    out.account("response", rows_in=rows_in, rows_out=written)


def _quarantine(rejected: pa.Table) -> pa.Table:
    return pa.table(
        {
            "row_id": rejected["completion_id"],
            "reason": pc.replace_substring_regex(rejected["reason"], r"(?s)[:\s].*", ""),
            "where": pa.array(["respond.responses"] * rejected.num_rows, pa.string()),
            "user": rejected["user"],
            "raw": pa.nulls(rejected.num_rows, pa.string()),
        },
        schema=schemas.QUARANTINE,
    )


STAGE = Stage(
    name="metrics",
    phase="evaluation",
    paper="Sec. 2.5.1, 2.4.4, 3.3, Tables 4 and 7, Figure 10",
    inputs={
        "responses": Input("respond", "responses"),
        "prompts": Input("constrain", "prompts"),
        "characters": Input("ingest", "characters", optional=True),
        "earlier": Input("metrics", "judgements", optional=True, previous=True),
    },
    outputs={"metrics": "json", "style": "json", "judgements": "json", "scored": "completion"},
    config=MetricsConfig,
    run=run,
    sources=("labelled",),
    resources=Resources(cpus=2, memory_gib=6),
    models=("judge.model",),
    data=("style", "evaluation/rubric.yaml", "evaluation/agreement.json", "curation/weights"),
)
