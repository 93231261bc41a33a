"""What a configuration needs of GPUs, and that a stage which can't run on what it is granted is told in a line."""

from __future__ import annotations

import pytest

from flywheel_tasks.compute.demand import gpus, misfit
from flywheel_tasks.core.stage import Resources
from flywheel_tasks.pipeline import STAGES, by_name, load_config

LEARNERS = "placement={workers: 8, gpus: 1}"


@pytest.mark.parametrize(
    ("stage", "settings", "needed"),
    [
        ("rl", [], 0),  # an engine on one GPU also runs on cores
        ("rl", [LEARNERS, "tensor_parallel=4", "rollout_gpus=4"], 12),  # the engine lives with the rollouts
        ("rl", [LEARNERS, "engine.replicas=2", "rollout_gpus=1"], 11),  # all three at once
        ("sft", [LEARNERS, "serving.tensor_parallel=2"], 8),  # one after the other
        ("dpo", ["serving.tensor_parallel=4", "serving.engine.replicas=3"], 12),
        ("pairs", ["candidates=[{path: /models/big, tensor_parallel: 16}]"], 16),  # a policy after another
        ("constrain", ["policy={path: /models/p, tensor_parallel: 2}", "scoring.engine.replicas=3"], 6),
        ("diversify", ["embed_actors=5", "embed_gpus=0.5"], 3),
        ("sft", ["base={path: /models/big, tensor_parallel: 8}"], 0),  # training does not read it
    ],
)
def test_gpus_in_use_at_once(stage: str, settings: list[str], needed: int):
    config = load_config("demo", None, [f"{stage}.{one}" for one in settings])
    assert gpus(config.stages[stage]) == needed


def test_over_several_nodes_an_engine_has_gpus_of_its_own():
    config = load_config("demo", None, [f"rl.{LEARNERS}", "rl.tensor_parallel=4", "rl.rollout_gpus=1"])
    assert gpus(config.stages["rl"], nodes=2) == 13


def test_the_demo_fits_a_machine_without_gpus():
    config = load_config("demo")
    assert [why for s in STAGES if (why := misfit(s.name, config.stages[s.name], Resources(gpus=0)))] == []


@pytest.mark.parametrize(
    ("settings", "granted", "said"),
    [
        ([LEARNERS], Resources(gpus=4), "sft is set for 8 GPUs and granted 4"),
        ([LEARNERS], Resources(gpus=3, nodes=2), "granted 3 on each of 2 nodes"),
        ([LEARNERS], Resources(gpus=4, nodes=2), None),
        ([], by_name("sft").resources, "sft would hold 8 GPUs and train on cores"),
        ([], Resources(gpus=1), None),
    ],
)
def test_a_misfit_names_the_stage_and_what_to_set(settings: list[str], granted: Resources, said: str | None):
    why = misfit("sft", load_config("demo", None, [f"sft.{one}" for one in settings]).stages["sft"], granted)
    assert (why is None) if said is None else (said in str(why) and "resources.sft" in str(why))
