"""The climb on a reward whose optimum is known: it rises, over seeds, by either loss; overlapped rollouts too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.bench_rises import interval
from benchmarks.counting import counting, vowels
from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.herding.reward import Scale, scale_of
from flywheel_tasks.herding.rl_hooks import Batches, Sync
from flywheel_tasks.herding.rl_remote import Here
from flywheel_tasks.herding.rollouts import Rollouts
from flywheel_tasks.models.lora import Lora
from flywheel_tasks.models.probe import ProbeConfig
from flywheel_tasks.simulation.characters import character_table, demo_characters
from flywheel_tasks.training import rl
from flywheel_tasks.training.config import PlacementConfig, TrainingConfig
from flywheel_tasks.training.loop import Job, run_loop
from flywheel_tasks.training.step import World
from tests.herding import rl_world
from tests.training.bags import Here as Link

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 26
SEEDS = (101, 102, 103)
"""None of those by which the learning rate was chosen."""


@pytest.fixture(scope="module")
def rollouts(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rollouts]:
    pointwise = counting(tiny_model, tmp_path_factory.mktemp("counting"), vowels)
    judges, cast = {"pointwise": pointwise, "pairwise": pointwise}, character_table(demo_characters())
    told = rl_world.setup(tiny_model, judges, cast, train={"batch": 18}, sampling={"k": 8})
    with rl_world.unpinned(), Rollouts(told) as made:
        made.load(rl_world.week(24), Scale(0.0, 1.0))
        found = made.respond(rl_world.week(24), 4, "scale")
        made.load(rl_world.week(24), scale_of(found.completions["prompt_id"], found.raw))
        yield made


def climb(
    rollouts: Rollouts, model: Path, folder: Path, seed: int, loss: rl.LossConfig, ahead: bool = False
) -> Sequence[dict[str, Any]]:
    """One run of the real loop in this process; every seed draws other batches from other adapters."""

    def source() -> Batches:
        made = Batches(Here(rollouts), STEPS, loss.updates, ahead)
        made.restore({"cursor": 1000 * seed})
        return made

    probe = rollouts.probe_prompts(2)
    job = Job(
        rl.task(model, loss, lora=Lora(rank=8), seed=seed),
        TrainingConfig(steps=STEPS, learning_rate=0.015, warmup=0.0, floor=1.0),
        PlacementConfig(save_every=1000), seed, f"file://{folder.absolute()}/run", source=source,
        hooks=(*rl.hooks(loss), lambda: Sync(Here(rollouts), probe, ProbeConfig(tokens=4, most=1.0, mean=0.3), 1)),
    )  # fmt: skip
    folder.mkdir()
    link = Link(folder)
    run_loop(job, World(), link)
    return link.lines


def worth(rollouts: Rollouts, prompts: pa.Table, seed: int) -> float:
    """What the policy that is served earns on prompts it does not learn from."""
    return float(np.nanmean(rollouts.respond(prompts, 4, f"worth-{seed}").raw))


@pytest.mark.parametrize("kind", ["grpo", "online_dpo"])
def test_the_reward_rises_over_seeds(rollouts: Rollouts, tiny_model: Path, tmp_path: Path, kind: str) -> None:
    others = rl_world.week(60).slice(24)
    gains = []
    for seed in SEEDS:
        loss = rl.LossConfig(kind=kind)  # type: ignore[arg-type]
        rollouts.serve(str(tiny_model))
        before = worth(rollouts, others, seed)
        lines = climb(rollouts, tiny_model, tmp_path / str(seed), seed, loss)
        gains.append(worth(rollouts, others, seed) - before)
        assert all(np.isfinite(list(line["metrics"].values())).all() for line in lines)
    assert interval(gains)[0] > 0, gains


def test_with_overlap_the_rollouts_are_one_step_old_and_it_still_rises(
    rollouts: Rollouts, tiny_model: Path, tmp_path: Path
) -> None:
    rollouts.serve(str(tiny_model))
    on = climb(rollouts, tiny_model, tmp_path / "on", 7, rl.LossConfig())
    rollouts.serve(str(tiny_model))
    ahead = climb(rollouts, tiny_model, tmp_path / "ahead", 7, rl.LossConfig(), ahead=True)
    gaps = [np.mean([line["metrics"]["gap"] for line in lines[1:]]) for lines in (on, ahead)]
    assert gaps[1] > 2 * gaps[0]
    rewards = [line["metrics"]["reward/total"] for line in ahead]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.3


def test_a_policy_that_drifts_from_its_engine_ends_the_run(
    rollouts: Rollouts, tiny_model: Path, tmp_path: Path
) -> None:
    """The bound is below any rounding here: what must be seen is the end of a run, in one line."""
    probe = rollouts.probe_prompts(2)
    loss = rl.LossConfig(grpo=rl.GrpoConfig(beta=0))
    strict = ProbeConfig(tokens=4, most=1e-9, mean=1e-9)
    job = Job(
        rl.task(tiny_model, loss, lora=Lora(rank=2)), TrainingConfig(steps=2), PlacementConfig(), 0,
        f"file://{tmp_path}/run", source=lambda: Batches(Here(rollouts), 2, 1, False),
        hooks=(lambda: Sync(Here(rollouts), probe, strict, 1),),
    )  # fmt: skip
    with pytest.raises(FlywheelError, match="does not run the trainer's weights"):
        run_loop(job, World(), Link(tmp_path))
