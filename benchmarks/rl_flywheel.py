"""GRPO as the stage `rl` runs it: engine, reward model, learner, hand-over of the weights and the logprob probe."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.bench_training import Lines
from benchmarks.generation_prompts import CHARACTERS, MODEL
from benchmarks.rl_setting import BETA, CLIP, LEARNING_RATE, MAX_TOKENS, PARTS, PROMPTS, RANK, SEED, WARM_UP, K
from flywheel_tasks.core.config import ModelConfig
from flywheel_tasks.curation.language import LanguageConfig
from flywheel_tasks.herding import reward, rl_hooks
from flywheel_tasks.herding.reward import RewardConfig
from flywheel_tasks.herding.rl_config import DriftConfig
from flywheel_tasks.herding.rl_remote import Asked, Here, rollouts
from flywheel_tasks.herding.rollouts import Rollouts, Setup
from flywheel_tasks.models.engine_config import EngineConfig, Sampling
from flywheel_tasks.models.engine_wire import Request
from flywheel_tasks.models.generate import cards
from flywheel_tasks.models.lora import Lora
from flywheel_tasks.models.memory import keep_pages
from flywheel_tasks.models.probe import ProbeConfig
from flywheel_tasks.models.resolve import local_folder
from flywheel_tasks.training import rl
from flywheel_tasks.training.config import PlacementConfig, TrainingConfig
from flywheel_tasks.training.loop import Job, run_loop
from flywheel_tasks.training.run import train
from flywheel_tasks.training.step import World

_DRIFT = DriftConfig()
_LOSS = rl.LossConfig(grpo=rl.GrpoConfig(clip=CLIP, beta=BETA))


def here(prompts: str, reward_model: str, steps: int) -> dict[str, Any]:
    """The loop and the rollouts in this process, the engine in its own."""
    keep_pages()
    with Rollouts(_setup(reward_model)) as made, tempfile.TemporaryDirectory(prefix="flywheel-bench-") as folder:
        far, table = Here(made), pq.read_table(prompts)
        half = _load(far, table)
        link = Lines()
        run_loop(_job(far, steps, folder), World(), link)
        return _told([line["metrics"] for line in link.lines], half)


def on_ray(prompts: str, reward_model: str, steps: int) -> dict[str, Any]:
    """The learner on Ray Train and the rollouts in a Ray actor, as in the stage."""
    lines: list[Mapping[str, float]] = []
    with (
        tempfile.TemporaryDirectory(prefix="flywheel-bench-") as folder,
        rollouts(_setup(reward_model), gpus=0, deadline_s=900) as far,
    ):
        half = _load(far, pq.read_table(prompts))
        job = _job(far, steps, folder)
        train(
            job.task, None, job.config, job.placement, seed=job.seed, folder=job.folder, source=job.source,
            hooks=job.hooks, on_metrics=lambda _, values: lines.append(values),
        )  # fmt: skip
    return _told(lines, half)


def _setup(reward_model: str) -> Setup:
    return Setup(
        policy=ModelConfig(path=str(local_folder(MODEL))),
        reward_model=reward_model,
        pairwise_model="",
        cards=cards(CHARACTERS),
        engine=EngineConfig(),
        sampling=Sampling(k=K, max_tokens=MAX_TOKENS),
        room=2048,
        reward=RewardConfig(),
        loss=_LOSS,
        language=LanguageConfig(),
        batch=PROMPTS,
        seed=SEED,
    )


def _load(far: Asked, prompts: pa.Table) -> float:
    """Give the prompts to the rollouts; the seconds in which an engine answers half of a step's, once it is warm."""
    drawn = far.ask("respond", prompts.slice(0, PROMPTS), K, "scale")
    far.ask("load", prompts, reward.scale_of(drawn.completions["prompt_id"], drawn.raw))
    # Another first token: nothing of these prompts is in the prefix cache, as after a hand-over of weights.
    requests = [Request(f"half-{i}", [ids[-1], *ids[1:]]) for i, ids in enumerate(drawn.prompts[: PROMPTS // 2])]
    began = time.monotonic()
    far.ask("draw", requests, Sampling(k=K, max_tokens=MAX_TOKENS, seed=3))
    return time.monotonic() - began


def _job(far: Asked, steps: int, folder: str) -> Job:
    task = rl.task(local_folder(MODEL), _LOSS, lora=Lora(rank=RANK, alpha=2 * RANK), seed=1)
    probe = ProbeConfig(tokens=_DRIFT.tokens, most=_DRIFT.most, mean=_DRIFT.mean)
    hooks = [
        *rl.hooks(_LOSS),
        partial(rl_hooks.Sync, far, far.ask("probe_prompts", _DRIFT.prompts), probe, 1),
    ]
    config = TrainingConfig(batch=PROMPTS, learning_rate=LEARNING_RATE, warmup=0, floor=1)
    return Job(
        task, config, PlacementConfig(), 1, f"file://{folder}/run",
        source=partial(rl_hooks.Batches, far, steps, 1, False), hooks=tuple(hooks),
    )  # fmt: skip


def _told(lines: Sequence[Mapping[str, float]], half: float) -> dict[str, Any]:
    counted = lines[WARM_UP:]
    return {
        "step_s": [line["seconds/step"] for line in counted],
        "parts": {name: statistics.median(line[f"seconds/{name}"] for line in counted) for name in PARTS},
        "generate_half": half,
        "tokens": statistics.fmean(line["tokens"] for line in counted),
        "response_tokens": statistics.fmean(line["response/tokens"] for line in counted),
        "computed_share": statistics.fmean(line["computed_share"] for line in counted),
        "kl": counted[-1]["kl"],
        "drift": max(line["probe/drift_max"] for line in counted),
    }
