"""Learners that share one policy: whole copies or shards of it (FSDP2), and the weights that reach the engines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from flywheel_tasks.training.step import World
from tests.herding import learners
from tests.training import bags
from tests.training.test_workers import two


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shards-lora-float32", "shards-full-float32", "shards-lora-bfloat16"])
def test_shards_learn_and_hand_over_what_one_whole_policy_does(tmp_path: Path, tiny_model: Path, kind: str) -> None:
    """Two updates on each of two rollouts, interrupted in between. What is served is held against the learners by the
    probe after every hand-over; past its bounds it would have ended the run."""
    one = learners.learn(tmp_path / "alone", tiny_model, kind.replace("shards", "copies"), World())
    two("tests.herding.learners", str(tmp_path), str(tiny_model), kind)
    first, second = (json.loads((tmp_path / f"learner-{rank}/lines.json").read_text()) for rank in (0, 1))
    assert bags.losses_of(first)[2:] == bags.losses_of(second)  # the history before a resume is the first learner's
    loose = 5e-2 if "bfloat16" in kind else 2e-3
    assert np.allclose(bags.losses_of(first), bags.losses_of(one), rtol=loose, atol=loose)
    for lines in (one, first):
        assert [line["step"] for line in lines] == list(range(4))
        assert ["probe/drift_max" in line["metrics"] for line in lines] == [False, True, False, True]
        assert [line["metrics"].get("asked") for line in lines] == [None, 0.0, None, 2.0]
    alone, shared = (json.loads((tmp_path / f"{who}/told.json").read_text()) for who in ("alone", "learner-0"))
    for told in (alone, shared):
        assert told["calls"] == ["start_weight_update", "update_weights", "finish_weight_update"]
        assert told["announced"]
        assert told["sent"]
    if kind == "shards-lora-float32":  # in bfloat16 so small a divergence is rounding
        assert shared["kl"] > 0
        assert shared["kl"] == pytest.approx(alone["kl"], rel=0.2)
