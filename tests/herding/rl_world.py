"""A small week for online RL: prompts of a few people, and preference models that nobody trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from flywheel_tasks.core.config import ModelConfig
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.herding.rl import STAGE
from flywheel_tasks.herding.rl_config import RlConfig
from flywheel_tasks.herding.rollouts import Setup
from flywheel_tasks.models import generate
from flywheel_tasks.simulation.characters import demo_characters
from tests.curation.curation_runs import prompts
from tests.herding.conftest import run
from tests.preherding.conftest import TOPICS, Given

CHANGES: dict[str, Any] = {
    "train": {"steps": 4, "epochs": 9, "batch": 4, "learning_rate": 0.003, "warmup": 0.0, "floor": 1.0},
    "sampling": {"k": 4, "max_tokens": 10},
    "engine": {"cache_gib": 0.1, "context": 512, "stall_seconds": 120},
    "lora": {"rank": 4, "alpha": 8},
    "max_tokens": 400,
    "selection": {"share": 1.0},
    "guardrail": {"every": 2, "prompts": 6, "ideal": 0.98, "hard": 0.99, "draws": 200},
    "reward": {"long": 0.0, "repetition": 0.0, "language": 0.0, "format": 0.0},
    "placement": {"save_every": 2, "deadline_s": 300},
}


def config(**changes: Any) -> RlConfig:
    merged = CHANGES | {
        name: CHANGES[name] | value if isinstance(CHANGES.get(name), dict) and isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return RlConfig(**merged)


def judge(base: Path, folder: Path, kind: str, seed: int = 0) -> Path:
    """A fresh head on a model: an arbitrary opinion, but a fixed one."""
    from flywheel_tasks.models.chat import load_tokenizer
    from flywheel_tasks.models.checkpoint import save_scorer
    from flywheel_tasks.models.heads import load_scorer

    save_scorer(load_scorer(base, kind=kind, seed=seed), load_tokenizer(base), folder)  # type: ignore[arg-type]
    return folder


def week(n: int) -> pa.Table:
    cast = demo_characters()
    return prompts(
        [
            {
                "prompt_id": f"c{i}.0",
                "conversation_id": f"c{i}",
                "character_id": cast[i % len(cast)].character_id,
                "locale": "en_US",
                "source": "internal" if i % 5 == 0 else "production",
                "near_policy": i % 5 != 0 and i != 7,
                "split": "eval" if i % 4 == 3 else "train",
                "turns": [{"role": "user", "content": f"I keep thinking of {TOPICS[i % 6]} on day {i}"}],
            }
            for i in range(n)
        ]
    )


def stage(
    store: Store,
    given: Given,
    characters: pa.Table,
    policy: Path,
    judges: dict[str, Path],
    key: str = "2" * 32,
    prompts: pa.Table | None = None,
    **changes: Any,
) -> Artifact:
    artifacts = {
        "policy": (given("dpo", {"model": policy}), "model"),
        "prompts": (given("constrain", {"prompts": week(24) if prompts is None else prompts}), "prompts"),
        "characters": (given("ingest", {"characters": characters}), "characters"),
        "reward": (given("preference-pointwise", {"model": judges["pointwise"]}), "model"),
        "pairwise": (given("preference-pairwise", {"model": judges["pairwise"]}), "model"),
    }
    return run(STAGE, store, config(**changes), artifacts, key=key)


def setup(policy: Path, judges: dict[str, Path], characters: pa.Table, **changes: Any) -> Setup:
    """What a stage would tell the rollouts' process."""
    told = config(**changes)
    return Setup(
        policy=ModelConfig(path=str(policy)), reward_model=str(judges["pointwise"]),
        pairwise_model=str(judges["pairwise"]), cards=generate.cards(characters), engine=told.engine,
        sampling=told.sampling, room=told.max_tokens, reward=told.reward, loss=told.loss, language=told.language,
        batch=told.train.batch, seed=17,
    )  # fmt: skip


@contextmanager
def unpinned() -> Iterator[None]:
    """Threads that wait for each other crawl when other processes use the same cores: one each, pinned nowhere."""
    import torch

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
