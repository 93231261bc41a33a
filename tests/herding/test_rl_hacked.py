"""The lesson of V12, run: a reward that counts emoji is hacked by real GRPO, and the guardrails end the run in time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import pytest
import torch

from flywheel_tasks.core.config import ModelConfig
from flywheel_tasks.curation.language import LanguageConfig
from flywheel_tasks.herding import guardrail, rl_hooks
from flywheel_tasks.herding.guardrail import GuardrailConfig
from flywheel_tasks.herding.reward import RewardConfig, Scale
from flywheel_tasks.herding.rl_remote import Here
from flywheel_tasks.herding.rollouts import Rollouts, Setup
from flywheel_tasks.models.engine_config import EngineConfig, Sampling
from flywheel_tasks.models.lora import Lora
from flywheel_tasks.models.probe import ProbeConfig
from flywheel_tasks.models.score import PairRow, ScoreRow
from flywheel_tasks.training import rl, state
from flywheel_tasks.training.config import PlacementConfig, TrainingConfig
from flywheel_tasks.training.loop import Job, run_loop
from flywheel_tasks.training.step import World
from tests.herding.rl_tables import prompts, turns
from tests.tiny_llama import SPECIAL, VOCABULARY, build_tiny_llama
from tests.training.bags import Here as Reporter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

EMOJI = "😀😁😂😃"
EVERY, STEPS, HELD_OUT = 2, 40, 80
NONE = RewardConfig(long=0, repetition=0, language=0, format=0)
LOSS = rl.LossConfig(grpo=rl.GrpoConfig(beta=0.0))


class Counter:
    """A reward model that likes emoji and nothing else."""

    def pointwise(self, rows: Sequence[ScoreRow]) -> np.ndarray:
        return np.array([sum(row.response.count(emoji) for emoji in EMOJI) for row in rows], np.float32)


class Indifferent:
    """A second judge that the policy cannot please."""

    def pairwise(self, rows: Sequence[PairRow]) -> np.ndarray:
        return np.full(len(rows), 0.5, np.float32)


class Hackable(Rollouts):
    _pointwise: Any = Counter()  # type: ignore[assignment]
    _pairwise: Any = Indifferent()  # type: ignore[assignment]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a tokenizer in which four emoji are tokens, so that it says them by chance."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = build_tiny_llama(tmp_path_factory.mktemp("emoji"))
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    said = [splitter.pre_tokenize_str(emoji)[0][0] for emoji in EMOJI]
    merges = {(emoji[:end], emoji[end]) for emoji in said for end in range(1, len(emoji))}
    letters = [(a, b) for a in ascii_lowercase for b in ascii_lowercase]
    ordered = sorted(merges, key=lambda pair: (len(pair[0]), pair))
    ordered += letters[: VOCABULARY - len(SPECIAL) - len(alphabet) - len(ordered)]
    tokens = [*SPECIAL, *alphabet, *map("".join, ordered)]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=ordered))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == len(tokens)
    return folder


def climb(policy: Path, folder: Path, config: GuardrailConfig) -> tuple[list[Mapping[str, Any]], list[int]]:
    """Lines of every step, and which steps were published."""
    setup = Setup(
        policy=ModelConfig(path=str(policy)), reward_model="", pairwise_model="", cards={}, reward=NONE, loss=LOSS,
        engine=EngineConfig(cache_gib=0.1, context=256, stall_seconds=120), sampling=Sampling(k=8, max_tokens=12),
        room=250, language=LanguageConfig(), batch=8, seed=3,
    )  # fmt: skip
    said = [{"turns": turns(f"What about {i}?"), "prompt_id": f"x{i}", "character_id": "none"} for i in range(140)]
    with Hackable(setup) as made:
        far = Here(made)
        table = prompts(said)
        far.ask("load", table.slice(HELD_OUT), Scale(0.0, 1.0))
        start = far.ask("respond", table.slice(0, HELD_OUT), 1, "start")
        hooks = (
            partial(rl_hooks.Sync, far, far.ask("probe_prompts", 2), ProbeConfig(tokens=2), 1),
            partial(rl_hooks.Watch, far, table.slice(0, HELD_OUT), start, config, steps=STEPS, temperature=1.0, seed=0),
            partial(rl_hooks.Halt, config),
        )
        link = Reporter(folder.parent)
        job = Job(
            rl.task(policy, LOSS, lora=Lora(rank=4, alpha=8), seed=1),
            TrainingConfig(batch=8, learning_rate=1e-2, warmup=0, floor=1, publish_every=EVERY),
            PlacementConfig(), 1, f"file://{folder}", hooks=hooks,
            source=partial(rl_hooks.Batches, far, STEPS, 1, False),
        )  # fmt: skip
        run_loop(job, World(), link)
    return link.lines, [one.step for one in state.published(f"file://{folder}")]


def test_a_reward_that_counts_emoji_is_stopped_by_the_guardrails(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    config = GuardrailConfig(every=EVERY, prompts=HELD_OUT, draws=200)
    lines, published = climb(policy, tmp_path / "run", config)
    assert "stop at step" in lines[-1]["stopped"]
    assert len(lines) < STEPS
    levels = [found for line in lines if (found := guardrail.of_metrics(line["step"] + 1, line["metrics"]))]
    chosen = guardrail.nearest(levels, published, config)
    at = lines[chosen - 1]["metrics"]
    assert at["guard/win_rate"] < config.hard
    assert at["guard/win_rate_pairwise"] == 0.5
    assert lines[-1]["metrics"]["guard/emoji"] > lines[-1]["metrics"]["guard/start_emoji"]
