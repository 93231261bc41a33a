"""Preferences whose truth is known: people like the response that asks back and repeats what the user spoke of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from flywheel_tasks.core import schemas
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.simulation.characters import character_table, demo_characters
from tests.curation.curation_runs import commit

TOPICS = ("the garden", "my exam", "a storm", "our dog", "the violin", "old maps")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture(scope="session")
def characters() -> pa.Table:
    return character_table(demo_characters())


def preferences(n: int, batches: tuple[str, ...], seed: int = 0) -> pa.Table:
    """Equal lengths, no emoji: content alone tells chosen from rejected."""
    rng = np.random.default_rng(seed)
    characters = [c.character_id for c in demo_characters()]
    rows = []
    for i in range(n):
        topic = TOPICS[rng.integers(len(TOPICS))]
        rows.append(
            dict.fromkeys(("language", "jtbd"))
            | {
                "preference_id": f"f{i}", "pair_id": f"p{i}", "prompt_id": f"q{i}", "user": "0" * 32,
                "character_id": characters[rng.integers(len(characters))], "traffic": "user", "locale": "en_US",
                "mode": "static", "split": "eval" if i % 4 == 0 else "train",
                "turns": [{"role": "user", "content": f"I keep thinking of {topic}"}],
                "chosen": f"Oh, {topic}! tell me more?", "rejected": f"Ok. {topic}. that is it.",
                "agreement": "single", "n_reviews": 1, "conflict": False,
                "batch": batches[i % len(batches)], "policy_chosen": "a", "policy_rejected": "b",
            }
        )  # fmt: skip
    return pa.Table.from_pylist(rows, schemas.PREFERENCE)


Given = Callable[[str, Mapping[str, Any]], Artifact]


@pytest.fixture
def given(store: Store) -> Given:
    """Commit an upstream artifact from tables, JSON values and model folders."""
    number = iter(range(10**6))

    def make(stage: str, outputs: Mapping[str, Any]) -> Artifact:
        contracts = {name: _contract(value) for name, value in outputs.items()}

        def fill(out: Output) -> None:
            rows = 0
            for name, value in outputs.items():
                if isinstance(value, pa.Table):
                    rows += value.num_rows
                    with out.table(name) as writer:
                        writer.write(value)
                elif isinstance(value, Path):
                    for file in value.iterdir():
                        (out.folder(name) / file.name).write_bytes(file.read_bytes())
                else:
                    out.json(name, value)
            out.account("row", rows_in=rows, rows_out=rows)

        return commit(store, stage, contracts, fill, f"{next(number):032x}")

    return make


def _contract(value: Any) -> str:
    if isinstance(value, pa.Table):
        return next(name for name, schema in schemas.SCHEMAS.items() if schema.names == value.schema.names)
    return "checkpoint" if isinstance(value, Path) else "json"
