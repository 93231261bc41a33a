"""The people around the flywheel in a demo: users who chat with the policy in production, and annotators who answer."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path

from flywheel_tasks.annotation import publish
from flywheel_tasks.core.config import ModelConfig
from flywheel_tasks.models.engine import open_engine
from flywheel_tasks.models.engine_config import EngineConfig, Sampling
from flywheel_tasks.simulation import annotators
from flywheel_tasks.simulation.characters import character_table, demo_characters
from flywheel_tasks.simulation.engine_policy import engine_policy
from flywheel_tasks.simulation.traffic import TrafficTruth, write_event_log

REPLY = Sampling(temperature=0.7, top_p=0.95, max_tokens=48)
CARDS = "characters.jsonl"
LOGS = "logs"


def chat_with(
    policy: ModelConfig, version: str, folder: Path, *, users: int, days: int, seed: int, start: dt.date
) -> TrafficTruth:
    """A stretch of traffic with a real policy, as logs and character cards below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    cards = character_table(demo_characters()).to_pylist()
    (folder / CARDS).write_text(
        "".join(json.dumps(card, ensure_ascii=False) + "\n" for card in cards), encoding="utf-8"
    )
    with open_engine(policy, EngineConfig(context=2048, cache_gib=2.0)) as engine:
        replies = {version: engine_policy(engine, REPLY.seeded(seed))}
        return write_event_log(folder / LOGS, users=users, days=days, seed=seed, start=start, policies=replies)


def answer(exports: Path, deliveries: Path, *, people: int, noise: float, seed: int, day: dt.date) -> int:
    """Annotators answer every export that has no delivery yet, through the file contract; returns how many reviews."""
    team = annotators.team(people, seed, noise=noise)
    given = 0
    for export in sorted(path.name for path in exports.iterdir() if path.is_dir()):
        if not list(deliveries.glob(f"*-{export.lower()}.jsonl")):
            tasks = publish.tasks(publish.read(str(exports), export)["tasks.jsonl"])
            found = annotators.reviews(tasks, team, day, seed)
            annotators.deliver(found, deliveries, day, vendor=export.lower())
            given += len(found)
    return given
