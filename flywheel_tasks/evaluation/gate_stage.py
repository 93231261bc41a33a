"""gate: everything that was measured about the candidate, and the decision (Sec. 2.5.1, 2.6, 3.1.2)."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.stage import Input, Inputs, Resources, Stage
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.evaluation.gate_config import GateConfig

SECTION_OF = {
    "winrate": "rm_win_rate",
    "metrics": "metrics",
    "style": "style_drift",
    "benchmarks": "benchmarks",
    "respond": "overlap",
    "preference-pointwise": "reward_models",
    "preference-pairwise": "reward_models",
}
"""Whose report gives which section of the evidence."""
MEASURED_FROM = {
    "winrate": ("responses", "pointwise", "pairwise"),
    "metrics": ("responses",),
    "style": ("responses",),
    "benchmarks": ("candidate",),
}
"""The inputs that a measurement shares with this gate: its responses, its candidate, its reward models."""
BY_PEOPLE = ("annotations", "shown")
"""Inputs in which people compared the two models side by side."""


def run(inputs: Inputs, config: GateConfig, out: Output) -> None:
    """Assemble the evidence of this cycle and decide: PASS, HOLD (a person decides) or BLOCK.

    The decision is an output, not an error: `promote` acts on it. The page holds numbers and ids, never words.
    """
    from flywheel_tasks.core.config import ModelConfig
    from flywheel_tasks.core.storage import open_external
    from flywheel_tasks.evaluation.assemble import assemble, plain
    from flywheel_tasks.evaluation.gate import decide
    from flywheel_tasks.evaluation.gate_view import page

    artifacts = {name: found[0] for name in STAGE.inputs if name not in BY_PEOPLE and (found := inputs.maybe(name))}
    of_another(artifacts, out.cycle)
    reports: dict[str, Any] = {
        _source(name): artifact.json(STAGE.inputs[name].output) for name, artifact in artifacts.items()
    }
    measured_at: dict[str, datetime] = {}
    for name, artifact in artifacts.items():
        section = SECTION_OF[_source(name)]
        at = artifact.manifest.finished
        measured_at[section] = min(at, measured_at.get(section, at))
    candidate, made_at = _made(artifacts["responses"], "candidate")
    champion, _ = _made(artifacts["responses"], "champion")
    paths = {name: str(reports["respond"].get(name) or "") for name in ("candidate", "champion")}
    new = candidate or ModelConfig(path=paths["candidate"]).name
    old = champion or ModelConfig(path=paths["champion"]).name
    if compared := _side_by_side(inputs, new, old, config, out):
        reports["human"], measured_at["human_win_rate"] = compared
    given = {}
    for source in inputs.sources.get("evidence", ()):
        with open_external(source.uri) as stream:
            given[source.uri] = stream.read()
    evidence = assemble(
        reports,
        given,
        candidate=candidate or paths["candidate"] or None,
        champion=champion or paths["champion"] or None,
        candidate_made_at=made_at,
        measured_at=measured_at,
    )
    decision = decide(evidence, config, datetime.now(UTC))
    out.json("decision", decision.as_json() | {"candidate": evidence.candidate, "champion": evidence.champion})
    out.json("evidence", plain(evidence))
    facts = {
        "cycle": out.cycle,
        "candidate": evidence.candidate or "unknown",
        "champion": evidence.champion or "unknown",
    }
    facts |= {name: artifact.uri for name, artifact in artifacts.items()}
    out.file("page", "gate.html").write_text(page(decision, f"Gate {out.cycle}", facts), encoding="utf-8")
    for verdict in ("PASS", "HOLD", "BLOCK"):
        out.metric(f"gate.{verdict}", float(decision.decision == verdict))
    for finding in decision.findings:
        if finding.value is not None:
            out.metric(f"gate.{finding.rule}.{finding.subject}", finding.value)


def of_another(artifacts: Mapping[str, Artifact], cycle: str) -> None:
    """Refuse what was measured of something else: another candidate's numbers would vouch for this one."""
    keys = {name: artifact.manifest.key for name, artifact in artifacts.items()}
    answered = artifacts["responses"].manifest
    keys |= {name: record.key for name, record in answered.inputs.items() if name == "candidate"}
    for name, shared in MEASURED_FROM.items():
        if name not in artifacts:
            continue
        stage, inputs = STAGE.inputs[name].stage, artifacts[name].manifest.inputs
        for field in shared:
            used = inputs[field].key if field in inputs else None
            if used != keys.get(field):
                raise InputError(
                    f"{stage} measured {field} {(used or 'none')[:12]}, and this cycle's is now "
                    f"{keys.get(field, 'none')[:12]}: run `flywheel run {stage} --cycle {cycle}` again, then the gate"
                )


def _source(name: str) -> str:
    """`metrics` gives two reports; every other stage one."""
    return name if name == "style" else STAGE.inputs[name].stage


def _side_by_side(
    inputs: Inputs, candidate: str, champion: str, config: GateConfig, out: Output
) -> tuple[dict[str, Any], datetime] | None:
    """What people preferred who saw these two models side by side, if any has answered by now (Sec. 2.5.1)."""
    from flywheel_tasks.core.quarantine import of_others
    from flywheel_tasks.evaluation.human import compare

    annotations, shown = inputs.maybe("annotations"), inputs.maybe("shown")
    if annotations is None or shown is None:
        return None
    said, pairs = (of_others(inputs[name].read(), inputs.forgotten) for name in BY_PEOPLE)
    found = compare(said, pairs, candidate, champion, alpha=config.alpha, seed=out.seed)
    if found.rate is None:
        return None
    out.metric("human_win_rate", found.rate.rate)
    people = {"annotators": found.annotators, "conversations": found.conversations}
    return found.rate._asdict() | people, annotations[0].manifest.finished


def _made(responses: Artifact, name: str) -> tuple[str | None, datetime | None]:
    """Which checkpoint answered as `name`, and when it was made; None where it came from outside the store."""
    record = responses.manifest.inputs.get(name)
    if record is None:
        return None, None
    found = Store(responses.storage.uri).get(record.stage, record.key)
    return f"{record.stage}/{record.key}", found.manifest.finished


STAGE = Stage(
    name="gate",
    phase="evaluation",
    paper="Sec. 2.5.1, 2.6, 3.1.2",
    inputs={
        "responses": Input("respond", "report"),
        "winrate": Input("winrate", "winrate"),
        "metrics": Input("metrics", "metrics", optional=True),
        "style": Input("metrics", "style", optional=True),
        "benchmarks": Input("benchmarks", "benchmarks", optional=True),
        "pointwise": Input("preference-pointwise", "report", optional=True),
        "pairwise": Input("preference-pairwise", "report", optional=True),
        "annotations": Input("side-by-side-import", "annotations", optional=True),
        "shown": Input("side-by-side", "tasks", optional=True),
    },
    outputs={"decision": "json", "evidence": "json", "page": "file"},
    config=GateConfig,
    run=run,
    sources=("evidence",),
    data=("evaluation/templates",),
    resources=Resources(cpus=1, memory_gib=1),
    uses_cycle=True,
)
