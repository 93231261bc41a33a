"""What a run of online RL may be told."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from flywheel_tasks.herding.rl_config import RlConfig
from tests.herding import rl_world


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"sampling": {"k": 1}}, "k is 1: a response is compared within its group"),
        ({"sampling": {"k": 4, "top_p": 0.9}}, "draws from another policy than eq. 8 learns"),
        ({"sampling": {"k": 4, "max_tokens": 2048}}, "leaves no room for a prompt"),
        ({"continue": 0.5}, r"user signals never reward RL \(Sec. 3.5.5\)"),
        ({"reward": {"thumb_up": 1.0}}, r"user signals never reward RL \(Sec. 3.5.5\)"),
        ({"reward": {"model": {"path": "store/artifacts/signal-rm/ab/model"}}}, r"Sec. 3.5.5"),
        ({"train": {"publish_every": 7}}, "checkpoints are kept where they are measured"),
        ({"loss": {"updates": 4}, "guardrail": {"every": 6}}, "guardrail.every must be a multiple of loss.updates"),
        ({"loss": {"updates": 4}, "guardrail": {"every": 8}}, "placement.save_every must be a multiple"),
        ({"loss": {"kind": "online_dpo", "updates": 2}}, "leave it at 1"),
        ({"lora": {"dropout": 0.1}}, "nothing may drop"),
        ({"placement": {"shard": True}}, "set workers to 2 or more"),
        ({"placement": {"gpus": 1}, "tensor_parallel": 4}, "GPUs of the learners .* set rollout_gpus to 4"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        RlConfig(**changes)


def test_an_ab_of_the_two_losses_is_one_key() -> None:
    one, other = rl_world.config(), rl_world.config(loss={"kind": "online_dpo"})
    differ = {name for name in RlConfig.model_fields if getattr(one, name) != getattr(other, name)}
    assert differ == {"loss"}
    assert one.loss.model_copy(update={"kind": "online_dpo"}) == other.loss


def test_learners_and_engines_with_gpus_of_their_own_are_accepted() -> None:
    assert RlConfig(placement={"gpus": 1}, rollout_gpus=1).rollout_gpus == 1
    assert RlConfig(rollout_gpus=0).placement.gpus == 0


@given(st.integers(1, 500), st.integers(1, 64), st.integers(1, 5), st.integers(1, 200), st.sampled_from([1, 2, 5]))
def test_a_run_is_whole_rollouts_and_no_longer_than_its_passes(
    prompts: int, batch: int, epochs: int, steps: int, updates: int
) -> None:
    train = {"batch": batch, "epochs": epochs, "steps": steps}
    config = RlConfig(train=train, loss={"updates": updates})
    found = config.training(prompts)
    assert found.steps is not None
    assert found.steps % updates == 0
    rollouts = found.steps // updates
    assert 1 <= rollouts <= -(-prompts // batch) * epochs
    assert found.steps <= max(steps, updates)
    assert found.publish_every == config.guardrail.every
