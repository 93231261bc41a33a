"""Does online RL find what is rewarded? SmolLM2-135M with LoRA learns, by GRPO and by online DPO, a reward whose
optimum is known: the worth of a token is its share of vowels, the reward their mean, read by a scorer's checkpoint
like any other (counting.py). There is no peer: what is measured is whether the reward rises.

Every seed draws other adapters, batches and responses. Prompts that no run learns from are answered before and after
with the same sampling seed; the gain is the difference of the mean rewards, in standard deviations of the first
policy's responses to a prompt. The t-interval over the seeds must leave out 0.

Learning rate and steps are those of one trial on seed 7, none of the three; `--quick` runs it for a few steps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Contender, Report, compare
from benchmarks.rl_setting import ALLOCATOR

TRIAL, SEEDS = 7, (101, 102, 103)
STEPS, PROMPTS, K, MAX_TOKENS, RANK, LEARNING_RATE = 12, 6, 6, 24, 16, 1e-3
"""Of a run: steps, prompts of a step, responses to each, most tokens of a response, rank of the adapters."""
HELD_OUT, ANSWERS = 24, 4
"""Prompts that are answered before and after, and responses to each."""
USUAL = 0.3
"""What a token of English is worth, about. It is taken off, since bfloat16 has more digits for what is near 0."""


def main(quick: bool) -> Report:
    seeds, steps = ((TRIAL,), 3) if quick else (SEEDS, STEPS)
    told = {"seeds": seeds, "steps": steps}
    report = compare(
        "rises",
        f"known optimum: {steps} steps of {PROMPTS} × {K} responses × {MAX_TOKENS} tokens, SmolLM2-135M, LoRA r{RANK}",
        [
            Contender(name, "benchmarks.bench_rises:climbs", {"kind": kind, **told}, env=ALLOCATOR)
            for name, kind in (("GRPO", "grpo"), ("online DPO", "online_dpo"))
        ],
        repeats=1,
        unit="steps",
        timeout_s=3600,
    )
    report.notes.extend(note(row.name, row.result) for row in report.rows)
    return report


def note(name: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """The gain with its interval over seeds, and in words that need no reward model."""
    gains = [run["gain"] for run in runs]
    before, after = (np.mean([run[f"vowels_{when}"] for run in runs]) for when in ("before", "after"))
    seeds = ", ".join(f"{run['gain']:+.2f} (seed {run['seed']})" for run in runs)
    told = f"{name}: reward on held-out prompts {seeds}; vowels {before:.1%} to {after:.1%} of the text"
    if len(gains) < 2:
        return f"{told}; one seed has no interval"
    low, high = interval(gains)
    verdict = "it rises" if low > 0 else "not shown to rise"
    return f"{told}; mean {np.mean(gains):+.2f} [{low:+.2f}, {high:+.2f}]: {verdict}"


def interval(gains: Sequence[float]) -> tuple[float, float]:
    """Student's, of the mean, 95 %."""
    from scipy import stats

    low, high = stats.t.interval(0.95, len(gains) - 1, np.mean(gains), stats.sem(gains))
    return float(low), float(high)


def climbs(kind: str, seeds: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """A run for each seed, with one engine."""
    import pyarrow.parquet as pq

    from benchmarks.counting import counting, vowels
    from benchmarks.generation_prompts import CHARACTERS, MODEL, write_prompts
    from flywheel_tasks.core.config import ModelConfig
    from flywheel_tasks.curation.language import LanguageConfig
    from flywheel_tasks.herding.reward import RewardConfig, scale_of
    from flywheel_tasks.herding.rollouts import Rollouts, Setup
    from flywheel_tasks.models.engine_config import EngineConfig, Sampling
    from flywheel_tasks.models.generate import cards
    from flywheel_tasks.models.resolve import local_folder
    from flywheel_tasks.training.rl import LossConfig

    base, loss = local_folder(MODEL), LossConfig(kind=kind)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(prefix="flywheel-bench-") as name:
        folder = Path(name)
        setup = Setup(
            policy=ModelConfig(path=str(base)),
            reward_model=str(counting(base, folder / "reward", lambda text: vowels(text) - USUAL)),
            pairwise_model="",
            cards=cards(CHARACTERS),
            engine=EngineConfig(cache_gib=0.5),
            sampling=Sampling(k=K, max_tokens=MAX_TOKENS),
            room=1024,
            reward=RewardConfig(long=0, repetition=0, language=0, format=0),
            loss=loss,
            language=LanguageConfig(),
            batch=PROMPTS,
            seed=1,
        )
        prompts = pq.read_table(write_prompts(folder / "prompts.parquet", HELD_OUT + PROMPTS * STEPS))
        others, learned = prompts.slice(0, HELD_OUT), prompts.slice(HELD_OUT)
        with Rollouts(setup) as rollouts:
            first = rollouts.respond(learned.slice(0, HELD_OUT), K, "scale")
            scale = scale_of(first.completions["prompt_id"], first.raw)
            rollouts.load(learned, scale)
            found = []
            for seed in seeds:
                rollouts.serve(str(base))
                before = rollouts.respond(others, ANSWERS, f"held-out-{seed}")
                rewards = climb(rollouts, base, f"file://{folder}/{seed}", loss, seed, steps)
                after = rollouts.respond(others, ANSWERS, f"held-out-{seed}")
                told: dict[str, Any] = {"seed": seed, "rewards": rewards}
                for when, drawn in (("before", before), ("after", after)):
                    told[when] = float(np.nanmean(drawn.raw) - scale.mean) / scale.spread
                    told[f"vowels_{when}"] = float(np.mean([*map(vowels, drawn.completions["text"].to_pylist())]))
                found.append(told | {"gain": told["after"] - told["before"]})
    return found


def climb(rollouts: Any, base: Path, folder: str, loss: Any, seed: int, steps: int) -> list[float]:
    """The loop of the stage `rl` in this process. Returns the mean reward of each step's responses."""
    from benchmarks.bench_training import Lines
    from flywheel_tasks.herding import rl_hooks
    from flywheel_tasks.herding.rl_config import DriftConfig
    from flywheel_tasks.herding.rl_remote import Here
    from flywheel_tasks.models.lora import Lora
    from flywheel_tasks.models.probe import ProbeConfig
    from flywheel_tasks.training import rl
    from flywheel_tasks.training.config import PlacementConfig, TrainingConfig
    from flywheel_tasks.training.loop import Job, run_loop
    from flywheel_tasks.training.step import World

    far, drift = Here(rollouts), DriftConfig()

    def source() -> rl_hooks.Batches:
        made = rl_hooks.Batches(far, steps, loss.updates, False)
        made.restore({"cursor": 1000 * seed})
        return made

    probe = ProbeConfig(tokens=drift.tokens, most=drift.most, mean=drift.mean)
    sync = partial(rl_hooks.Sync, far, rollouts.probe_prompts(drift.prompts), probe, loss.updates)
    link = Lines()
    job = Job(
        rl.task(base, loss, lora=Lora(rank=RANK, alpha=2 * RANK), seed=seed),
        TrainingConfig(batch=PROMPTS, learning_rate=LEARNING_RATE, warmup=0, floor=1),
        PlacementConfig(), seed, folder, source=source, hooks=(*rl.hooks(loss), sync),
    )  # fmt: skip
    run_loop(job, World(), link)
    return [line["metrics"]["reward/total"] for line in link.lines]
