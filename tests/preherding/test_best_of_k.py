"""Algorithm 1 on a policy whose rewards are known: with one token a response, its distribution can be written down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from flywheel_tasks.core.config import ModelConfig
from flywheel_tasks.core.store import Store
from flywheel_tasks.models.chat import Template, card_of, load_tokenizer
from flywheel_tasks.models.engine_config import EngineConfig, SamplingConfig
from flywheel_tasks.models.generate import cards
from flywheel_tasks.models.score import Scorer, ScoreRow
from flywheel_tasks.preherding.rejection_config import RejectionConfig, ThresholdConfig
from flywheel_tasks.preherding.rejection_sample import STAGE
from tests.curation.curation_runs import prompts, run
from tests.preherding.conftest import TOPICS, Given
from tests.preherding.test_rejection_sample import judges  # noqa: F401  # a fixture

K, REPEATS = 4, 40


def asked(characters: pa.Table) -> pa.Table:
    """Six contexts, each of them many prompts."""
    same = {"character_id": characters["character_id"][0].as_py(), "locale": "en_US", "source": "production"}
    return prompts(
        [
            {
                "prompt_id": f"c{i}.0", "conversation_id": f"c{i}", "near_policy": True, "split": "train", **same,
                "turns": [{"role": "user", "content": f"I keep thinking of {TOPICS[i % len(TOPICS)]}"}],
            }
            for i in range(REPEATS * len(TOPICS))
        ]
    )  # fmt: skip


def known(model: Path, reward: Path, table: pa.Table, characters: pa.Table) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each context the reward and the probability of all that can be said in one token; silence is left out."""
    import torch
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer, scorer, cast = load_tokenizer(model), Scorer(reward), cards(characters)
    tokens = np.arange(len(tokenizer))[:, None]
    said = [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    spoken = np.array([bool(text) for text in said])
    found = []
    for row in table.slice(0, len(TOPICS)).to_pylist():
        card = card_of(cast, row["character_id"])
        ids = Template(tokenizer).chat(row["turns"], card=card).ids
        with torch.inference_mode():
            chance = torch.softmax(policy(torch.tensor(ids)[None]).logits[0, -1], -1).double().numpy()[spoken]
        rewards = scorer.pointwise([ScoreRow(row["turns"], said[n], card) for n in np.flatnonzero(spoken)])
        found.append((rewards.astype(float), chance / chance.sum()))
    return found


def best_of(rewards: np.ndarray, chance: np.ndarray, j: int) -> tuple[float, float]:
    """Mean and variance of the highest of j rewards: P(max <= r) is F(r)^j."""
    order = np.argsort(rewards)
    mass = np.diff(np.cumsum(chance[order]) ** j, prepend=0.0)
    mean = float(mass @ rewards[order])
    return mean, float(mass @ (rewards[order] - mean) ** 2)


def test_the_best_of_k_earns_what_the_policys_own_distribution_says(
    store: Store,
    given: Given,
    characters: pa.Table,
    judges: dict[str, Path],  # noqa: F811
    tiny_model: Path,
) -> None:
    table = asked(characters)
    inputs = {
        "prompts": (given("constrain", {"prompts": table}), "prompts"),
        "characters": (given("ingest", {"characters": characters}), "characters"),
        "reward": (given("preference-pointwise", {"model": judges["pointwise"]}), "model"),
        "signals": (given("signal-rm", {"model": judges["signals"]}), "model"),
    }
    config = RejectionConfig(
        policy=ModelConfig(path=str(tiny_model)),
        least_policies=1,
        engine=EngineConfig(dtype="float32", cache_gib=0.1, context=512),
        sampling=SamplingConfig(k=K, max_tokens=1),
        threshold=ThresholdConfig(value=-1e6, quantile=None),
        signals={},
        keep_unfinished=True,
    )
    made = run(STAGE, store, config, inputs, key="a" * 32)
    truth = known(tiny_model, judges["pointwise"], table, characters)
    curve = made.json("report")["best_of_k"]
    for j in range(1, K + 1):
        means, variances = np.array([best_of(*one, j) for one in truth]).T
        # Rows with a silent response are left out of the curve: fewer than half.
        assert curve[j - 1] == pytest.approx(means.mean(), abs=4 * np.sqrt(variances.mean() / (table.num_rows / 2)))
    gain = np.mean([best_of(*one, K)[0] - best_of(*one, 1)[0] for one in truth])
    assert gain > 8 * np.sqrt(np.mean([best_of(*one, K)[1] for one in truth]) / table.num_rows)
    rows = made.table("completions").read().to_pylist()
    reward = {row["completion_id"]: {s["name"]: s["value"] for s in row["scores"]}["reward"] for row in rows}
    kept = {row["prompt_id"]: reward[row["completion_id"]] for row in rows if row["accepted"]}
    spoken = [row for row in rows if row["text"].strip()]
    best = {row["prompt_id"]: max(reward[r["completion_id"]] for r in of_prompt(spoken, row)) for row in spoken}
    assert kept == best
    assert len(kept) > 0.9 * table.num_rows


def of_prompt(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    return [other for other in rows if other["prompt_id"] == row["prompt_id"]]
