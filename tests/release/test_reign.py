"""A cycle keeps the policy that it started with, whoever is crowned meanwhile."""

from __future__ import annotations

from pathlib import Path

from flywheel_tasks.core.config import FlywheelConfig, ModelConfig, ModelsConfig, StageConfig, model_of
from flywheel_tasks.core.store import Store
from flywheel_tasks.release.ledger import Change, Model, append
from flywheel_tasks.release.reign import for_stage, policy_of

FIRST, SECOND = (Model(stage="rl", key=digit * 32, output="model", sha256=digit * 64) for digit in "ab")


class Uses(StageConfig):
    policy: ModelConfig = model_of("policy", "who answers")
    judge: ModelConfig = model_of("reward", "who judges")


def crown(store: Store, model: Model, cycle: str) -> None:
    append(store.storage, lambda state: Change("crown", model, cycle, "a test", "because", f"readout/{model.key}"))


def test_a_cycle_keeps_its_policy_and_the_next_one_takes_the_new(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert policy_of(store, "2026-W46") is None
    crown(store, FIRST, "2026-W46")
    assert [policy_of(store, cycle) for cycle in ("2026-W46", "2026-W47")] == [None, FIRST]
    crown(store, SECOND, "2026-W47")
    assert [policy_of(store, cycle) for cycle in ("2026-W46", "2026-W47", "2026-W48")] == [None, FIRST, SECOND]


def test_stages_get_the_champion_unless_they_name_their_own(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    crown(store, FIRST, "2026-W46")
    base = ModelConfig(path="/m/base", tensor_parallel=8)
    own = ModelConfig(path="/m/own")
    models = ModelsConfig(policy=base, reward=base, signal=base)
    stages = {"a": Uses(policy=base, judge=base), "b": Uses(policy=own, judge=base), "c": StageConfig()}
    config = FlywheelConfig(models=models, stages=stages)
    found = for_stage(config, "a", store, "2026-W47")
    champion = ModelConfig(path=f"{store.uri}/artifacts/rl/{'a' * 32}/model", tensor_parallel=8)
    assert found.models.policy == champion
    assert found.stages["a"] == Uses(policy=champion, judge=base)
    assert for_stage(config, "b", store, "2026-W48") == config


def test_a_stage_that_uses_no_policy_does_not_settle_it(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    config = FlywheelConfig(stages={"c": StageConfig()})
    assert for_stage(config, "c", store, "2026-W47") == config
    assert not list(tmp_path.rglob("*.json"))
