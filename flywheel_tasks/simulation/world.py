"""The people around the flywheel in a demo: users who chat with the policy in production or with the arm that they were
assigned to, annotators who answer, and a reviewer who decides a HOLD."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flywheel_tasks.annotation import publish
from flywheel_tasks.core.config import ModelConfig
from flywheel_tasks.models.engine import open_engine
from flywheel_tasks.models.engine_config import EngineConfig, Sampling
from flywheel_tasks.simulation import annotators
from flywheel_tasks.simulation.characters import character_table, demo_characters
from flywheel_tasks.simulation.chat import Mix
from flywheel_tasks.simulation.engine_policy import engine_policy
from flywheel_tasks.simulation.traffic import TrafficTruth, write_event_log
from flywheel_tasks.simulation.users import SimulatedUser, make_users

REPLY = Sampling(temperature=0.7, max_tokens=48)
"""No top_p: on a CPU, sorting the vocabulary for every token takes nearly as long as the model itself."""
CARDS = "characters.jsonl"
LOGS = "logs"
TRUTH = "truth.json"
ENGINE = EngineConfig(context=2048, cache_gib=2.0)
DOUBTS = ("precision", "reward_model", "safety_ceiling", "win_rate")
"""Rules of the gate that hold because little was measured, or because reward models like the candidate better than is
usual: so they did V10, V11 and V14, which people liked too (Table 10)."""
CHANGES = ("false_refusal", "benchmark")
"""Those that hold because something got worse, or because few answers can't rule it out: a measured rise tells."""


def chat_with(
    served: Mapping[str, ModelConfig],
    folder: Path,
    people: Sequence[SimulatedUser],
    *,
    days: int,
    seed: int,
    start: dt.date,
    mix: Mix | None = None,
    version_of: Mapping[str, str] | None = None,
    reply: Sampling = REPLY,
) -> TrafficTruth:
    """A stretch of traffic with real policies (version → model), as logs, character cards and what was true of it below
    `folder`. `version_of` says who is served which version; without it chance decides for every conversation."""
    folder.mkdir(parents=True, exist_ok=True)
    cards = character_table(demo_characters()).to_pylist()
    (folder / CARDS).write_text(
        "".join(json.dumps(card, ensure_ascii=False) + "\n" for card in cards), encoding="utf-8"
    )
    with ExitStack() as engines:
        # An engine's start is ten seconds on one core: the arms' start side by side.
        with ThreadPoolExecutor(len(served)) as pool:
            opened = pool.map(lambda model: engines.enter_context(open_engine(model, ENGINE)), served.values())
            started = dict(zip(served, opened, strict=True))
        replies = {version: engine_policy(engine, reply.seeded(seed)) for version, engine in started.items()}
        truth = write_event_log(
            folder / LOGS, people=people, days=days, seed=seed, start=start, policies=replies, mix=mix,
            version_of=version_of,
        )  # fmt: skip
    known = {version: answered(truth, version) for version in served}
    (folder / TRUTH).write_text(json.dumps({"lines": truth.lines, "answered": known}, indent=1), encoding="utf-8")
    return truth


def people(count: int, seed: int) -> list[SimulatedUser]:
    """Users who want about eight words, and mind that most. Of the tastes that the simulation knows this is one that a
    reward model of 135M learns from a hundred pairs; matching words, or a question in the middle, it does not."""
    return [_terse(person) for person in make_users(count, seed)]


def team(count: int, seed: int, noise: float) -> list[annotators.Annotator]:
    """Annotators with these users' taste."""
    return [replace(one, taste=_terse(one.taste)) for one in annotators.team(count, seed, noise=noise)]


def _terse(person: SimulatedUser) -> SimulatedUser:
    return replace(person, sweet_words=person.sweet_words / 3, length=3 * person.length)


def steady(people: Sequence[SimulatedUser], conversations_per_day: float) -> list[SimulatedUser]:
    """The same people, each coming equally often: the heavy tail of activity hides a lift from a hundred users."""
    return [replace(person, conversations_per_day=conversations_per_day) for person in people]


def answered(truth: TrafficTruth, version: str) -> dict[str, float]:
    """The true chance that a reply of this version is answered within 10 minutes: the latent engagement that no stage
    sees. Its interval takes users, not replies, as independent (a ratio of sums over users)."""
    sums: dict[str, list[float]] = {}
    for conversation in truth.conversations.values():
        if conversation.model_version == version:
            chances = [turn.p_continue for turn in conversation.turns if turn.p_continue]
            mine = sums.setdefault(conversation.user.user_id, [0.0, 0.0])
            mine[0] += sum(chances)
            mine[1] += len(chances)
    total, count = np.array(list(sums.values()), float).reshape(-1, 2).T
    replies = float(count.sum())
    if not replies:
        return {"mean": float("nan"), "low": float("nan"), "high": float("nan"), "replies": 0, "users": 0}
    mean = float(total.sum() / replies)
    users = len(sums)
    spread = float(np.sqrt(((total - mean * count) ** 2).sum() * users / max(users - 1, 1)) / replies)
    low, high = mean - 1.96 * spread, mean + 1.96 * spread
    return {"mean": mean, "low": low, "high": high, "replies": int(replies), "users": users}


def answer(
    exports: Path, deliveries: Path, reviewers: Sequence[annotators.Annotator], *, seed: int, day: dt.date
) -> int:
    """Annotators answer every export that has no delivery yet, through the file contract; returns how many reviews."""
    given = 0
    for export in unanswered(exports, deliveries):
        tasks = publish.tasks(publish.read(str(exports), export)["tasks.jsonl"])
        found = annotators.reviews(tasks, reviewers, day, seed)
        annotators.deliver(found, deliveries, day, vendor=export.lower())
        given += len(found)
    return given


def unanswered(exports: Path, deliveries: Path) -> list[str]:
    """The exports that no delivery answers."""
    found = sorted(path.name for path in exports.iterdir() if path.is_dir()) if exports.exists() else []
    return [export for export in found if not list(deliveries.glob(f"*-{export.lower()}.jsonl"))]


def review(rules: Sequence[Mapping[str, Any]]) -> tuple[Literal["Approve", "Reject"], str]:
    """A reviewer's answer to a HOLD, and why: a doubt is what an A/B test is for, a measured fall is not."""
    held = [rule for rule in rules if rule["verdict"] == "HOLD"]
    worse = [
        rule for rule in held if rule["rule"] not in DOUBTS and not (rule["rule"] in CHANGES and rule["value"] <= 0)
    ]
    if worse:
        return "Reject", f"simulated reviewer: something moved the wrong way: {worse[0]['reason']}"
    named = ", ".join(sorted({str(rule["rule"]) for rule in held}))
    return "Approve", f"simulated reviewer: nothing got worse, but there is doubt ({named}): let the A/B test decide"
