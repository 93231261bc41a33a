"""Which of a run's checkpoints leave it, and where its learners may be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.store import Store
from flywheel_tasks.herding.guardrail import GuardrailConfig
from flywheel_tasks.herding.rl import hand_out
from flywheel_tasks.herding.rl_hooks import reach
from flywheel_tasks.herding.rl_remote import Here
from flywheel_tasks.herding.rollouts import Rollouts
from flywheel_tasks.training import state
from flywheel_tasks.training.run import Trained
from tests.curation.curation_runs import commit
from tests.herding import rl_world
from tests.herding.conftest import store as store


def won(rate: float) -> dict[str, float]:
    return {"loss": 1.0, "guard/n_pointwise": 8.0, "guard/win_rate_pointwise": rate}


def test_only_checkpoints_that_the_judges_can_be_trusted_with_are_handed_out(store: Store, tmp_path: Path) -> None:
    """Step 15 was published but never measured, 30 is past the hard limit, and 40 is of an attempt that was killed
    before it saved: this run ended at 30."""
    folder, model = f"file://{tmp_path}/run", tmp_path / "model"
    model.mkdir()
    for step in (10, 15, 20, 30, 40):
        (model / "config.json").write_text(f'{{"step": {step}}}')
        state.publish(folder, step, model, {})
    history = {10: won(0.52), 15: {"loss": 1.0}, 20: won(0.61), 30: won(0.7)}
    trained = Trained(folder, steps=30, published=state.published(folder))
    said: list[Any] = []

    def run(out: Output) -> None:
        said.append(hand_out(trained, history, GuardrailConfig(), out))

    made = commit(store, "rl", {"model": "checkpoint", "steps": "checkpoints"}, run, "8" * 32)
    assert said == [(20, [10, 20])]
    assert {file.path.partition("/steps/")[2].split("/")[0] for file in made.manifest.outputs["steps"].files} == {
        "step-000010"
    }
    [model_file] = made.manifest.outputs["model"].files
    assert store.storage.read(f"artifacts/rl/{'8' * 32}/{model_file.path}") == b'{"step": 20}'


class Elsewhere(Here):
    """Rollouts on a machine where the learner's memory is not."""

    def begin(self, name: str, *arguments: Any) -> Callable[[], Any]:
        return super().begin(name, "/proc/4194305/fd/9", *arguments[1:])


def test_a_learner_away_from_the_engines_is_told_so_before_anything_is_generated() -> None:
    reach(Here(Rollouts))  # type: ignore[arg-type]  # what is asked needs no engine
    with pytest.raises(FlywheelError, match=r"not on the engines' machine.*one node"):
        reach(Elsewhere(Rollouts))  # type: ignore[arg-type]


def test_the_output_is_served_as_its_rollouts_were_by_one_engine() -> None:
    config = rl_world.config(engine={"replicas": 4}, tensor_parallel=2, exported={"mean": 0.05})
    assert config.serving.engine == config.engine.model_copy(update={"replicas": 1})
    assert (config.serving.tensor_parallel, config.serving.mean, config.serving.most) == (2, 0.05, 1.0)
