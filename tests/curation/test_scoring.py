"""Quality and difficulty from the last cycle's preference model, with a real engine and real scores (Table 1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from flywheel_tasks.core.config import ModelConfig
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.curation.constrain import STAGE, ConstrainConfig
from flywheel_tasks.curation.scoring import ScoringConfig
from flywheel_tasks.models.engine_config import EngineConfig, Sampling
from flywheel_tasks.simulation.characters import character_table, demo_characters
from tests.curation.curation_runs import commit, prompts, run

N, K = 40, 3
CARDS = character_table(demo_characters())


@pytest.fixture(scope="module")
def reward(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh head on the tiny model: arbitrary, but fixed, opinions."""
    from flywheel_tasks.models.chat import load_tokenizer
    from flywheel_tasks.models.checkpoint import save_scorer
    from flywheel_tasks.models.heads import load_scorer

    folder = tmp_path_factory.mktemp("reward")
    save_scorer(load_scorer(tiny_model, kind="pointwise"), load_tokenizer(tiny_model), folder)
    return folder


def week() -> pa.Table:
    names = CARDS["character_id"].to_pylist()
    return prompts(
        [
            {
                "prompt_id": f"p{i:02d}",
                "character_id": names[i % len(names)] if i else "nobody-knows",
                "first_turn": i % 4 == 0,
                "turns": [{"role": "user", "content": f"what do you think of {i * 7919}?"}],
            }
            for i in range(N)
        ]
    )


def constrain(folder: Path, policy: Path, reward: Path | None, **scoring: Any) -> tuple[Artifact, dict[str, Any]]:
    store, rows = Store(str(folder / "store")), week()

    def fill(out: Any) -> None:
        with out.table("prompts") as writer:
            writer.write(rows)
        out.json("report", {"traffic": {}})
        out.account("prompt", rows_in=N, rows_out=N)

    def cast(out: Any) -> None:
        with out.table("characters") as writer:
            writer.write(CARDS)
        out.account("character", rows_in=CARDS.num_rows, rows_out=CARDS.num_rows)

    def model(out: Any) -> None:
        for file in reward.iterdir() if reward else ():
            (out.folder("model") / file.name).write_bytes(file.read_bytes())
        out.account("preference", rows_in=1, rows_out=1)

    made = commit(store, "diversify", {"prompts": "prompt", "report": "json"}, fill, "1" * 32)
    given = {
        "prompts": (made, "prompts"),
        "report": (made, "report"),
        "characters": (commit(store, "ingest", {"characters": "character"}, cast, "3" * 32), "characters"),
    }
    if reward:
        given["reward"] = (commit(store, "preference-pointwise", {"model": "checkpoint"}, model, "4" * 32), "model")
    config = ConstrainConfig(
        character_cap=1.0,
        policy=ModelConfig(path=str(policy)),
        scoring=ScoringConfig(
            sampling=Sampling(k=K, max_tokens=8), engine=EngineConfig(cache_gib=0.1, context=512), **scoring
        ),
    )
    artifact = run(STAGE, store, config, given)
    return artifact, artifact.json("report")


def test_the_first_cycle_has_no_scores_and_says_so(tiny_model: Path, tmp_path: Path) -> None:
    artifact, report = constrain(tmp_path, tiny_model, None)
    assert {"quality", "difficulty"} <= set(report["absent_dimensions"])
    assert report["scored"] == 0
    assert artifact.table("prompts").read()["difficulty"].null_count == N


def test_scores_are_those_of_the_champions_own_responses(tiny_model: Path, reward: Path, tmp_path: Path) -> None:
    """What the stage wrote is the mean and the variance of scores taken apart from it, prompt by prompt."""
    from flywheel_tasks.models.engine import open_engine
    from flywheel_tasks.models.generate import cards, complete, encoder, prompt_room, template_of
    from flywheel_tasks.models.score import Scorer, ScoreRow

    artifact, report = constrain(tmp_path, tiny_model, reward)
    found = {row["prompt_id"]: row for row in artifact.table("prompts").read().to_pylist()}
    assert report["scored"] == N - 1  # one prompt names a character without a card
    assert found["p00"]["difficulty"] is None
    assert {"quality", "difficulty"} <= set(report["dimensions"])
    known, scorer = cards(CARDS), Scorer(reward)
    sampling = Sampling(k=K, max_tokens=8, seed=17)
    with open_engine(tiny_model, EngineConfig(cache_gib=0.1, context=512)) as engine:
        template = template_of(engine)
        encode = encoder(template, known, prompt_room(engine, sampling))
        (chunk,) = complete(engine, template, week().slice(1), encode, sampling, "champion")
    drawn = chunk.table.to_pylist()
    scores = scorer.pointwise([ScoreRow(r["turns"], r["text"], known[r["character_id"]]) for r in drawn]).reshape(-1, K)
    same = 0
    for row, values in zip(range(1, N), scores, strict=True):
        got = found[f"p{row:02d}"]
        same += np.isclose(got["quality"], values.mean(), atol=1e-3) and np.isclose(
            got["difficulty"], values.var(ddof=1), atol=1e-3
        )
    assert same >= N - 3  # bfloat16: another batch may turn a response another way


def test_prompts_beyond_the_budget_are_unknown_and_stay(tiny_model: Path, reward: Path, tmp_path: Path) -> None:
    artifact, report = constrain(tmp_path, tiny_model, reward, prompts=12)
    table = artifact.table("prompts").read()
    assert table.num_rows == N
    assert report["scored"] == table.num_rows - table["difficulty"].null_count <= 12
    assert "unknown" in report["dimensions"]["difficulty"]["values"]
