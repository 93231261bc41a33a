"""A store as the stages before evaluation leave it: prompts, answers of two models, random reward models."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from flywheel_tasks.annotation import side_by_side
from flywheel_tasks.core import ids, schemas
from flywheel_tasks.core.config import FlywheelConfig, ModelConfig, StageConfig
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.runner import run_stage
from flywheel_tasks.core.stage import Input, Inputs, Stage
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.core.tracking import Tracker
from flywheel_tasks.evaluation import gate_stage, winrate
from flywheel_tasks.release import promote

PROMPTS = 24
USER_KEY = "5" * 64


class Knobs(StageConfig):
    tiny: str = ""
    seed: int = 0
    leaked: int = 0
    violation: float = 0.05
    champion_fails: bool = False


class Answers(Knobs):
    """What a real `respond` is told, as far as later stages read it from its manifest."""

    champion: ModelConfig = ModelConfig(path="base")


def _rows(name: str, rows: list[dict[str, Any]]) -> pa.Table:
    fields = schemas.get(name)
    return pa.Table.from_pylist([dict.fromkeys(fields.names) | row for row in rows], schema=fields)


def _characters(inputs: Inputs, config: Knobs, out: Output) -> None:
    """Four personas."""
    with out.table("characters") as writer:
        plain = {"traits": ["kind"], "instructions": "Be brief.", "greeting": "hi", "review_status": "approved"}
        writer.write(
            _rows(
                "character", [{"character_id": f"c{i}", "name": f"C{i}", "description": "d"} | plain for i in range(4)]
            )
        )
    out.account("character", 4, 4)


def _prompts(inputs: Inputs, config: Knobs, out: Output) -> None:
    """As many internal prompts as of users."""
    told = {
        "locale": "en_US",
        "split": "eval",
        "first_turn": True,
        "turn_index": 0,
        "near_policy": True,
        "user": "u",
        "depth": "shallow",
    }
    rows = [
        told | {
            "prompt_id": f"p{i:02d}", "conversation_id": f"k{i}", "character_id": f"c{i % 4}",
            "source": "internal" if i % 2 else "production", "turns": [{"role": "user", "content": f"question {i}"}],
        }
        for i in range(PROMPTS)
    ]  # fmt: skip
    with out.table("prompts") as writer:
        writer.write(_rows("prompt", rows))
    out.account("prompt", PROMPTS, PROMPTS)


def _policy(inputs: Inputs, config: Knobs, out: Output) -> None:
    """A checkpoint of a few bytes."""
    (out.folder("model") / "model.safetensors").write_text(f"weights {config.seed}")


def _respond(inputs: Inputs, config: Knobs, out: Output) -> None:
    """Both models answer every prompt; the candidate failed once."""
    rows = []
    for prompt in inputs["prompts"].read().to_pylist():
        for policy in ("candidate", "champion"):
            number = int(prompt["prompt_id"][1:])
            failed = (policy == "candidate" and number == 3) or (policy == "champion" and config.champion_fails)
            same = {name: prompt[name] for name in ("prompt_id", "user", "character_id", "locale", "split", "turns")}
            own = {"completion_id": f"{policy}-{number}", "policy": policy, "finish": "error" if failed else "stop"}
            text = "" if failed else f"{policy} says {number * 7 % 5}"
            rows.append(same | own | {"text": text, "sample": 0, "tokens": 5, "scores": []})
    with out.table("responses") as writer:
        writer.write(_rows("completion", rows))
    out.account("response", len(rows), len(rows))
    leaked = [f"p{i:02d}" for i in range(config.leaked)]
    out.json(
        "report", {"overlap": {"prompts": PROMPTS, "leaked": config.leaked, "examples": leaked}, "champion": "base"}
    )


def _reward(kind: str) -> Any:
    def run(inputs: Inputs, config: Knobs, out: Output) -> None:
        """A scoring model with random weights."""
        from flywheel_tasks.models.chat import load_tokenizer
        from flywheel_tasks.models.checkpoint import save_scorer
        from flywheel_tasks.models.heads import load_scorer

        scorer = load_scorer(config.tiny, kind=kind, seed=config.seed)  # type: ignore[arg-type]
        save_scorer(scorer, load_tokenizer(Path(config.tiny)), out.folder("model"))
        lost = {
            "mode": "static",
            "batch": "261018",
            "n": 400,
            "drop": 0.01,
            "low": -0.01,
            "high": 0.03,
            "beyond": False,
        }
        overall = {"model": {"accuracy": 0.71, "low": 0.68, "high": 0.74, "n": 900}}
        out.json("report", {"version": "RM_261120", "overall": overall, "lost_on_old_batches": [lost]})

    return run


def _metrics(inputs: Inputs, config: Knobs, out: Output) -> None:
    """Numbers as STYLE's metrics report them."""

    def one(value: float | None, **more: Any) -> dict[str, Any]:
        bounds = {} if value is None else {"low": value - 0.01, "high": value + 0.01}
        return {"value": value, "n": 0 if value is None else 900, "set": "internal", "can_gate": True} | bounds | more

    judged = {"can_gate": False, "why": "its judge agrees with people at kappa 0.31"}
    new = {
        "instruction_violation": one(config.violation), "false_refusal_internal": one(0.9, **judged),
        "false_refusal_user": one(0.1), "average_length": one(31.0, low=30.0, high=32.0), "contains_emoji": one(0.2),
    }  # fmt: skip
    old = new | {"instruction_violation": one(0.05), "false_refusal_internal": one(0.1, **judged)}
    out.json("metrics", {"policies": {"candidate": new, "champion": old}})
    features = [
        {"name": "has_emoji", "n": 40, "effect": -0.2, "status": "ok"},
        {"name": "words", "n": 2, "effect": None, "status": "unknown"},
    ]
    out.json("style", [{"name": "candidate vs champion", "a": "candidate", "b": "champion", "features": features}])


def _benchmarks(inputs: Inputs, config: Knobs, out: Output) -> None:
    """One benchmark of both models."""
    both = {"candidate": {"rate": 0.29, "n": 1000}, "champion": {"rate": 0.30, "n": 1000}}
    out.json("benchmarks", {"benchmarks": {"hellaswag": both}})


def _stage(name: str, run: Any, outputs: dict[str, str], config: type[Knobs] = Knobs, **inputs: Input) -> Stage:
    return Stage(name, "evaluation", "Sec. 2.5.1", run, config, outputs, inputs)


PROMPTS_IN = Input("constrain", "prompts")
BEFORE = (
    _stage("ingest", _characters, {"characters": "character"}),
    _stage("constrain", _prompts, {"prompts": "prompt"}),
    _stage("rl", _policy, {"model": "checkpoint"}),
    _stage(
        "respond",
        _respond,
        {"responses": "completion", "report": "json"},
        Answers,
        prompts=PROMPTS_IN,
        candidate=Input("rl", "model"),
    ),
    _stage("preference-pointwise", _reward("pointwise"), {"model": "checkpoint", "report": "json"}),
    _stage("preference-pairwise", _reward("pairwise"), {"model": "checkpoint", "report": "json"}),
    _stage("metrics", _metrics, {"metrics": "json", "style": "json"}, responses=Input("respond", "responses")),
    _stage("benchmarks", _benchmarks, {"benchmarks": "json"}, candidate=Input("rl", "model")),
)
STAGES = (*BEFORE, winrate.STAGE, side_by_side.STAGE, side_by_side.IMPORT, gate_stage.STAGE, promote.STAGE)


class World:
    """One store. `run` runs stages of a cycle, in order."""

    def __init__(self, folder: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Tracker, "watch", lambda self, record: nullcontext())
        monkeypatch.setenv(ids.USER_KEY_VARIABLE, USER_KEY)
        self.store, self.tiny, self.folder = Store(f"file://{folder}/store"), str(tiny), folder

    def config(self, **sections: dict[str, Any]) -> FlywheelConfig:
        stages = {}
        for stage in STAGES:
            own = {"tiny": self.tiny} if issubclass(stage.config, Knobs) else {}
            stages[stage.name] = stage.config.model_validate(own | sections.get(stage.name.replace("-", "_"), {}))
        body = {"store": {"uri": self.store.uri}, "tracking": {"uri": f"sqlite:///{self.folder}/mlflow.db"}}
        return FlywheelConfig.model_validate(body).model_copy(update={"stages": stages})

    def run(self, *names: str, cycle: str = "2026-W47", **sections: dict[str, Any]) -> dict[str, Artifact]:
        wanted = names or tuple(stage.name for stage in STAGES)
        config = self.config(**sections)
        return {s.name: run_stage(s, cycle, config, self.store).artifact for s in STAGES if s.name in wanted}
