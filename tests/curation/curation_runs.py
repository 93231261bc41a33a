"""Run one stage on tables in a throwaway store, without tracking or scheduling."""

import datetime
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from flywheel_tasks.core import schemas
from flywheel_tasks.core.config import StageConfig
from flywheel_tasks.core.manifest import Manifest
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.stage import Inputs, Stage
from flywheel_tasks.core.store import Artifact, Store

CYCLE = "2026-W47"


def commit(
    store: Store, stage: str, contracts: Mapping[str, str], fill: Any, key: str = "0" * 32, seed: int = 17
) -> Artifact:
    """An artifact whose outputs `fill(out)` writes."""
    out = Output(store.storage, stage, key, f"attempt-{key[:8]}", contracts, seed=seed, cycle=CYCLE)
    now = datetime.datetime.now(datetime.UTC)
    try:
        fill(out)
        record = Manifest(
            stage=stage, key=key, cycle=CYCLE, attempt=f"attempt-{key[:8]}", inputs={}, sources=(),
            outputs=out.finish(),
            rows=out.rows, config={}, code_version="0" * 16, commit="", environment={}, started=now, finished=now,
            metrics={name: value for name, value, _ in out.metrics},
        )  # fmt: skip
        return store.commit(record)[0]
    finally:
        out.close()


def upstream(store: Store, stage: str, tables: list[pa.Table], key: str = "1" * 32) -> Artifact:
    """A committed table of prompts, one part per table."""

    def fill(out: Output) -> None:
        for table in tables:
            with out.table("prompts") as writer:
                writer.write(table)
        rows = sum(table.num_rows for table in tables)
        out.account("prompt", rows_in=rows, rows_out=rows)

    return commit(store, stage, {"prompts": "prompt"}, fill, key)


def run(
    stage: Stage,
    store: Store,
    config: StageConfig,
    given: Mapping[str, tuple[Artifact, str]],
    key: str = "2" * 32,
    seed: int = 17,
    forgotten: frozenset[str] = frozenset(),
) -> Artifact:
    inputs = Inputs(given, {}, forgotten)
    return commit(store, stage.name, stage.outputs, lambda out: stage.run(inputs, config, out), key, seed)


def prompts(rows: list[dict[str, Any]]) -> pa.Table:
    """Prompt rows from what matters to a test; everything else has a plain value."""
    plain = {
        "conversation_id": "c", "user": "0" * 32, "character_id": "char-0", "source": "production", "turn_index": 0,
        "first_turn": False, "locale": "en_US", "language": "en", "code_mixed": False, "jtbd": None, "depth": "short",
        "quality": None, "difficulty": None, "model_version": "V1", "near_policy": True, "split": "train",
        "turns": [{"role": "user", "content": "hi"}],
    }  # fmt: skip
    full = [plain | {"prompt_id": f"p{i}"} | row for i, row in enumerate(rows)]
    return pa.Table.from_pylist(full, schema=schemas.PROMPT)


def blobs(rows: int, seed: int = 0, width: int = 32, share_in_one: float = 0.6) -> np.ndarray:
    """Heavy-tailed: one tight blob holds most rows, the rest spreads over many centres."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(40, width))
    label = np.where(rng.random(rows) < share_in_one, 0, rng.integers(1, 40, rows))
    return centres[label] + rng.normal(size=(rows, width)) * 0.05
