"""Quality and difficulty of prompts (Table 1): the champion answers each several times, the last cycle's preference
model scores the answers. Difficulty is the variance of the scores within a prompt (Sec. 3.5.4)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from flywheel_tasks.core.config import ModelConfig, Operational, StageConfig
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.prompts import at_most
from flywheel_tasks.core.tables import TableReader
from flywheel_tasks.models.engine_config import EngineConfig, SamplingConfig

SCORES = ("quality", "difficulty")
_GENERATED_FROM = ["prompt_id", "user", "character_id", "locale", "language", "jtbd", "split", "turns"]


class ScoringConfig(StageConfig):
    prompts: int = Field(
        20_000, ge=0, description="prompts that are scored, chosen by hash; the rest count as unknown (0: none)"
    )
    sampling: SamplingConfig = Field(SamplingConfig(k=4), description="the responses to a prompt; a variance needs two")
    engine: EngineConfig = EngineConfig()
    deadline_s: float | None = Field(
        None, gt=0, description="most seconds for all responses", json_schema_extra=Operational
    )


def scored(
    prompts: TableReader,
    characters: pa.Table,
    policy: ModelConfig,
    reward: Path,
    config: ScoringConfig,
    out: Output,
) -> pa.Table:
    """quality and difficulty of every prompt, in the order of the prompts; null where none was measured."""
    from flywheel_tasks.stats import difficulty

    ids = prompts.read(["prompt_id"])
    chosen, _ = at_most(ids, config.prompts, out.seed)
    of = chosen["prompt_id"].combine_chunks()
    batches = (pa.Table.from_batches([batch]) for batch in prompts.batches(_GENERATED_FROM))
    wanted = pa.concat_tables([batch.filter(pc.is_in(batch["prompt_id"], of)) for batch in batches])
    parts = list(_rewards(wanted, characters, policy, reward, config, out))
    found = difficulty.by_prompt(
        pa.chunked_array([ids for ids, _ in parts], pa.string()),
        pa.chunked_array([pa.array(values, pa.float64()) for _, values in parts], pa.float64()),
    )
    place = pc.index_in(ids["prompt_id"], found["prompt_id"].combine_chunks())
    return found.select(SCORES).take(place)


def _rewards(
    prompts: pa.Table, characters: pa.Table, policy: ModelConfig, reward: Path, config: ScoringConfig, out: Output
) -> Iterator[tuple[pa.Array, np.ndarray]]:
    """Prompt ids and rewards of their responses, scored while the engine goes on; a failed response has none."""
    from flywheel_tasks.models import generate
    from flywheel_tasks.models.chat import card_of
    from flywheel_tasks.models.engine import open_engine
    from flywheel_tasks.models.score import Scorer, ScoreRow, while_or_after

    scorer, cards, done = Scorer(reward), generate.cards(characters), 0
    with open_engine(policy, config.engine) as engine:
        template, sampling = generate.template_of(engine), config.sampling.seeded(out.seed)
        encode = generate.encoder(template, cards, generate.prompt_room(engine, sampling))
        chunks = generate.complete(
            engine, template, prompts, encode, sampling, "champion",
            partial=out.partial, name="scoring", deadline=config.deadline_s,
        )  # fmt: skip
        for chunk in while_or_after(chunks, scorer):
            answered = chunk.table.filter(pc.not_equal(chunk.table["finish"], "error"))
            rows = [
                ScoreRow(row["turns"], row["text"], card_of(cards, row["character_id"]))
                for row in answered.select(["turns", "text", "character_id"]).to_pylist()
            ]
            yield answered["prompt_id"].combine_chunks(), scorer.pointwise(rows)
            done += chunk.table.num_rows // sampling.k
            out.progress(done, prompts.num_rows, "prompts scored")
