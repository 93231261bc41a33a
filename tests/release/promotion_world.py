"""A store with a candidate, a gate's decision on it, and a readout, made by real runs of small stages."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, tzinfo
from pathlib import Path
from typing import Any, Literal

import pytest

from flywheel_tasks.core.config import FlywheelConfig, StageConfig
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.runner import run_stage
from flywheel_tasks.core.stage import Input, Inputs, Stage
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.release import ledger, promote
from flywheel_tasks.release.served import served


class RlConfig(StageConfig):
    weights: str = "w"


class GateWords(StageConfig):
    decision: str = "PASS"
    of: Literal["the candidate", "another"] = "the candidate"
    says: str = "as told"


class ReadoutWords(StageConfig):
    experiment: str = "release-2026-W47"
    status: str = "closed"
    verdict: str = "ship"
    looked_on: int = 0
    tested: Literal["the candidate", "another", "unnamed"] = "the candidate"
    first: str = ""


def _rl(inputs: Inputs, config: RlConfig, out: Output) -> None:
    """A checkpoint of a few bytes."""
    (out.folder("policy") / "model.safetensors").write_text(config.weights)


def _respond(inputs: Inputs, config: StageConfig, out: Output) -> None:
    """Answers of the candidate."""
    out.json("report", {"overlap": {"prompts": 10, "leaked": 0}})


def _gate(inputs: Inputs, config: GateWords, out: Output) -> None:
    """A decision as told."""
    record = inputs.artifact("responses")[0].manifest.inputs["candidate"]
    name = f"{record.stage}/{record.key}" if config.of == "the candidate" else f"{record.stage}/{'0' * 32}"
    reasons = [] if config.decision == "PASS" else [f"{config.decision}: {config.says}"]
    out.json("decision", {"decision": config.decision, "candidate": name, "reasons": reasons, "rules": []})
    out.json("evidence", {})
    out.file("page", "gate.html").write_text("<p>page</p>")


def _readout(inputs: Inputs, config: ReadoutWords, out: Output) -> None:
    """A verdict as told, on the cycle's candidate over the champion of the moment, from its nomination's day on."""
    behind = served(config.experiment, ledger.read(Store(out.store_uri).storage)).as_json(out.store_uri)
    tested = behind["candidate"]
    if config.tested != "the candidate":
        tested = None if config.tested == "unnamed" else {"artifact": f"rl/{'0' * 32}", "sha256": "0" * 64}
    decisions = [{"arm": "test", "verdict": config.verdict, "reasons": ["breadth rose"]}]
    lift = {"kind": "bounded", "lift_pct": 1.5, "lift_pct_bounds": [0.5, 2.5]}
    words: dict[str, Any] = {
        "comparisons": {"test": {"breadth": lift}},
        "experiment": config.experiment,
        "candidate": tested,
        "champion": behind["champion"],
        "window": {"first": config.first or behind["nominated"]},
        "status": config.status,
        "problems": [],
        "decisions": decisions,
    }
    out.json("readout", words)


RL = Stage("rl", "herding", "Sec. 2.4.3", _rl, RlConfig, {"policy": "checkpoint"})
RESPOND = Stage(
    "respond",
    "evaluation",
    "Sec. 2.5.1",
    _respond,
    StageConfig,
    {"report": "json"},
    {"candidate": Input("rl", "policy")},
)
GATE = Stage(
    "gate", "evaluation", "Sec. 3.1.2", _gate, GateWords, {"decision": "json", "evidence": "json", "page": "file"},
    {"responses": Input("respond", "report")}, uses_cycle=True,
)  # fmt: skip
READOUT = Stage("readout", "release", "Sec. 2.5.2", _readout, ReadoutWords, {"readout": "json"}, uses_cycle=True)
STAGES = (RL, RESPOND, GATE, promote.STAGE, READOUT)


def ledger_on(monkeypatch: pytest.MonkeyPatch, day: date, hour: int = 9) -> None:
    """From now on the ledger's entries are of this moment."""

    class Then(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.combine(day, time(hour), UTC)

    monkeypatch.setattr(ledger, "datetime", Then)


class World:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(f"file://{folder}/store")
        self.tracking = f"sqlite:///{folder}/mlflow.db"

    def config(self, **sections: dict[str, Any]) -> FlywheelConfig:
        stages = {stage.name: stage.config.model_validate(sections.get(stage.name, {})) for stage in STAGES}
        return FlywheelConfig.model_validate(
            {"store": {"uri": self.store.uri}, "tracking": {"uri": self.tracking}}
        ).model_copy(update={"stages": stages})

    def run(self, stage: Stage, cycle: str = "2026-W47", **words: Any) -> Artifact:
        return run_stage(stage, cycle, self.config(**{stage.name: words}), self.store).artifact

    def gate(self, decision: str, cycle: str = "2026-W47", weights: str = "w", of: str = "the candidate") -> Artifact:
        """A cycle up to the gate."""
        self.run(RL, cycle, weights=weights)
        self.run(RESPOND, cycle)
        return self.run(GATE, cycle, decision=decision, of=of)

    def promote(
        self, decision: str, cycle: str = "2026-W47", weights: str = "w", of: str = "the candidate"
    ) -> Artifact:
        self.gate(decision, cycle, weights, of)
        return self.run(promote.STAGE, cycle)

    def readout(self, cycle: str = "2026-W47", **words: Any) -> Artifact:
        return self.run(READOUT, cycle, **({"experiment": f"release-{cycle}"} | words))
