"""Our generation stage, engine already started: rows in, committed chunks of completions out."""

from __future__ import annotations

import atexit
import tempfile
import time

import pyarrow.parquet as pq

from benchmarks.generation_prompts import CHARACTERS, CONFIG, MODEL, sampling, to_score
from flywheel_tasks.core.config import ModelConfig
from flywheel_tasks.core.partial import Partial
from flywheel_tasks.core.storage import Storage
from flywheel_tasks.models.engine import Engine
from flywheel_tasks.models.generate import cards, complete, encoder, prompt_room, template_of
from flywheel_tasks.models.score import Scorer, while_or_after

ENGINE = Engine(ModelConfig(path=MODEL), CONFIG).__enter__()
atexit.register(ENGINE.close)
TEMPLATE = template_of(ENGINE)


def generate(prompts: str, k: int, max_tokens: int, scorer: str | None = None) -> dict[str, float]:
    """With `scorer`, a chunk is scored when rejection sampling would."""
    rows, draw = pq.read_table(prompts), sampling(k, max_tokens)
    encode = encoder(TEMPLATE, cards(CHARACTERS), prompt_room(ENGINE, draw))
    judge = Scorer(scorer) if scorer else None
    tables, scoring = [], 0.0
    with tempfile.TemporaryDirectory() as store:
        partial = Partial(Storage(f"file://{store}"), "bench", "0" * 32)
        chunks = complete(ENGINE, TEMPLATE, rows, encode, draw, "bench", partial=partial)
        made = (chunk.table for chunk in chunks)
        for table in while_or_after(made, judge) if judge else made:
            tables.append(table)
            if judge:
                began = time.perf_counter()
                judge.pointwise(to_score(table.to_pylist()))
                scoring += time.perf_counter() - began
    stats = ENGINE.stats()
    return {
        "responses": sum(map(len, tables)),
        "tokens": float(sum(sum(table.column("tokens").to_pylist()) for table in tables)),
        "cached_share": round(stats["cached_tokens"] / stats["prompt_tokens"], 3),
        "engine_busy_share": round(stats["busy_seconds"] / stats["seconds"], 3),
        "scoring_s": round(scoring, 3),
    }
