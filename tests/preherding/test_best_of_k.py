"""Algorithm 1 on a policy whose every response has a known chance: the best of k is what order statistics say it is.

The policy is a Llama whose layers add nothing and whose embeddings are all alike, so that after any context the next
token is one of eight letters with chances written into its head. It is sampled by the real stage, through vLLM, and
judged by a real reward model; the expectation is computed from that model's score of each letter.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chisquare

from flywheel_tasks.core.config import ModelConfig
from flywheel_tasks.core.store import Store
from flywheel_tasks.models.chat import load_tokenizer
from flywheel_tasks.models.engine_config import EngineConfig, Sampling
from flywheel_tasks.models.generate import cards
from flywheel_tasks.models.score import Scorer, ScoreRow
from flywheel_tasks.preherding.rejection_config import RejectionConfig
from flywheel_tasks.preherding.rejection_sample import STAGE
from flywheel_tasks.simulation.characters import character_table, demo_characters
from tests.curation.curation_runs import run
from tests.preherding.conftest import Given
from tests.preherding.test_rejection_sample import judges as judges
from tests.preherding.test_rejection_sample import week
from tests.tiny_llama import build_tiny_llama

LETTERS = "abcdefgh"
CHANCES = np.array([0.30, 0.22, 0.16, 0.12, 0.08, 0.06, 0.04, 0.02])
K, PROMPTS = 4, 240
Floats = NDArray[np.float64]


@pytest.fixture(scope="module")
def known_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After the final norm every state is (sqrt(d), 0, …): a word's logit is its head's first weight times sqrt(d)."""
    from transformers import LlamaForCausalLM

    folder = build_tiny_llama(tmp_path_factory.mktemp("known"))
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    letters = load_tokenizer(folder).convert_tokens_to_ids(list(LETTERS))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.zero_()[:, 0] = 1
        width = model.config.hidden_size**0.5
        model.lm_head.weight.zero_()[:, 0] = -40 / width
        model.lm_head.weight[letters, 0] = torch.tensor(np.log(CHANCES) / width, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def moments_of_the_best(rewards: Floats, k: int) -> tuple[Floats, Floats]:
    """E and Var of the highest of k draws for each prompt: P(max <= r_(j)) = F_j^k."""
    order = np.argsort(rewards, axis=1)
    value = np.take_along_axis(rewards, order, 1)
    below = np.cumsum(CHANCES[order], axis=1) ** k
    chance = np.diff(below, axis=1, prepend=0)
    mean = (chance * value).sum(1)
    return mean, (chance * value**2).sum(1) - mean**2


def test_the_best_of_k_reaches_its_expectation(
    store: Store, given: Given, characters: object, judges: dict[str, Path], known_policy: Path
) -> None:
    inputs = {
        "prompts": (given("constrain", {"prompts": week(PROMPTS)}), "prompts"),
        "characters": (given("ingest", {"characters": characters}), "characters"),
        "reward": (given("preference-pointwise", {"model": judges["pointwise"]}), "model"),
        "signals": (given("signal-rm", {"model": judges["signals"]}), "model"),
    }
    config = RejectionConfig(
        policy=ModelConfig(path=str(known_policy)),
        least_policies=1,
        engine=EngineConfig(dtype="float32", cache_gib=0.1, context=512),
        sampling=Sampling(k=K, max_tokens=1),
        keep_unfinished=True,
        signals={},
        older_versions=True,
    )
    made = run(STAGE, store, config, inputs, key="e" * 32)
    rows = made.table("completions").read().to_pylist()
    assert {row["text"] for row in rows} <= set(LETTERS)
    counts = np.array([sum(row["text"] == letter for row in rows) for letter in LETTERS])
    assert chisquare(counts, CHANCES * len(rows)).pvalue > 1e-4

    cast = cards(character_table(demo_characters()))
    first = {row["prompt_id"]: row for row in rows}
    scorer = Scorer(judges["pointwise"])
    asked = [ScoreRow(row["turns"], letter, cast[row["character_id"]]) for row in first.values() for letter in LETTERS]
    rewards = scorer.pointwise(asked).astype(np.float64).reshape(-1, len(LETTERS))
    assert np.ptp(rewards, axis=1).min() > 0

    found = made.json("report")["best_of_k"]
    for k, value in enumerate(found, start=1):
        mean, variance = moments_of_the_best(rewards, k)
        # Four standard errors; those of k < K are smaller, since every subset of K draws is used.
        assert abs(value - mean.mean()) < 4 * np.sqrt(variance.sum()) / len(first), k
    gain = moments_of_the_best(rewards, K)[0].mean() - moments_of_the_best(rewards, 1)[0].mean()
    assert gain > 8 * np.sqrt(moments_of_the_best(rewards, K)[1].sum()) / len(first), "the test could not tell K from 1"
