"""The hand-over of weights: a single update that got lost ends the run, though no probe could see it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.herding.rl_config import DriftConfig
from flywheel_tasks.herding.rl_hooks import Sync
from flywheel_tasks.models.load import Policy, load_policy
from flywheel_tasks.models.lora import Lora
from flywheel_tasks.models.probe import ProbeConfig
from tests.herding.learners import PROMPTS, Served

USUAL = ProbeConfig(**{name: getattr(DriftConfig(), name) for name in ("tokens", "most", "mean")})


class Late(Served):
    """Engines of which the second and later hand-overs never come."""

    loaded: list[str] | None = None

    def serve(self, path: str) -> list[str]:
        self.loaded = self.loaded or super().serve(path)
        return self.loaded


def updated(policy: Policy) -> Policy:
    """One step of Adam at RL's usual rate."""
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.sign(torch.randn(parameter.shape)) * 2e-5)
    return policy


def test_one_update_that_did_not_arrive_ends_the_run(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    policy = load_policy(tiny_model, lora=Lora(), seed=1)
    on_time, late = (Sync(kind(tiny_model), PROMPTS, USUAL, 1) for kind in (Served, Late))
    for sync in (on_time, late):
        sync.start(policy)
    updated(policy)
    on_time.start(policy)
    with pytest.raises(FlywheelError, match="did not load the weights that the learner sent: 1 of 1 workers"):
        late.start(policy)
    monkeypatch.setattr("flywheel_tasks.models.arrival.check", lambda sent, loaded: None)
    late.start(policy)  # the probe alone lets it pass
