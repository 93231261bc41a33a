"""Which of a run's checkpoints leave it, what became of its prompts, and where its learners may be."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.quarantine import quarantined
from flywheel_tasks.core.store import Store
from flywheel_tasks.herding.guardrail import GuardrailConfig
from flywheel_tasks.herding.prompt_selection import Selected
from flywheel_tasks.herding.rl import account, hand_out
from flywheel_tasks.herding.rl_hooks import reach
from flywheel_tasks.herding.rl_remote import Here
from flywheel_tasks.herding.rollouts import Rollouts
from flywheel_tasks.training import state
from flywheel_tasks.training.run import Trained
from tests.curation.curation_runs import commit
from tests.herding import rl_world
from tests.herding.conftest import store as store
from tests.herding.rl_tables import prompts

LOSS = {"loss": 1.0}


def won(rate: float) -> dict[str, float]:
    return {**LOSS, "guard/n_pointwise": 8.0, "guard/win_rate_pointwise": rate}


def test_only_checkpoints_that_the_judges_can_be_trusted_with_are_handed_out(store: Store, tmp_path: Path) -> None:
    """Step 15 was published but never measured, 30 is past the hard limit, and 40 is of an attempt that was killed
    before it saved: this run ended at 30."""
    folder, model = f"file://{tmp_path}/run", tmp_path / "model"
    model.mkdir()
    for step, metrics in {10: won(0.52), 15: LOSS, 20: won(0.61), 30: won(0.7), 40: won(0.6)}.items():
        (model / "config.json").write_text(f'{{"step": {step}}}')
        state.publish(folder, step, model, metrics)
    trained = Trained(folder, [LOSS] * 30, published=state.published(folder))
    said: list[Any] = []

    def run(out: Output) -> None:
        said.append(hand_out(trained, GuardrailConfig(), out))

    made = commit(store, "rl", {"model": "checkpoint", "steps": "checkpoints"}, run, "8" * 32)
    assert said == [(20, [10, 20])]
    assert {file.path.partition("/steps/")[2].split("/")[0] for file in made.manifest.outputs["steps"].files} == {
        "step-000010"
    }
    [model_file] = made.manifest.outputs["model"].files
    assert store.storage.read(f"artifacts/rl/{'8' * 32}/{model_file.path}") == b'{"step": 20}'


@pytest.mark.parametrize("read_before", [True, False])
def test_weights_that_another_attempt_publishes_are_handed_out_with_their_own_measurement(
    store: Store, tmp_path: Path, read_before: bool
) -> None:
    """Both attempts measured steps 10 and 20: this one found itself below the ideal at each, the other one was past the
    hard limit at 20. Whichever was published when this one looked, no weights go out under the other's win-rate."""
    folder, model = f"file://{tmp_path}/run", tmp_path / "model"
    model.mkdir()

    def publish(whose: str, rates: dict[int, float]) -> None:
        for step, rate in rates.items():
            (model / "config.json").write_text(f"{whose}, {rate}")
            state.publish(folder, step, model, won(rate))

    mine, others = {10: 0.53, 20: 0.58}, {10: 0.55, 20: 0.72}
    publish("mine", mine)
    found = state.published(folder)
    publish("another's", others)
    history = [won(mine[step]) if step in mine else LOSS for step in range(1, 21)]
    trained = Trained(folder, history, published=found if read_before else state.published(folder))
    key = f"{int(read_before)}" * 32
    made = commit(
        store, "rl", {"model": "checkpoint", "steps": "checkpoints"},
        lambda out: hand_out(trained, GuardrailConfig(), out), key,
    )  # fmt: skip
    [file] = made.manifest.outputs["model"].files
    written = store.storage.read(f"artifacts/rl/{key}/{file.path}")
    assert written == (b"mine, 0.58" if read_before else b"another's, 0.55")


def test_a_prompt_that_is_neither_learned_from_nor_rejected_refuses_the_commit(store: Store) -> None:
    week = prompts([{"prompt_id": f"p{i}"} for i in range(3)])
    gone = quarantined(week.slice(2), "prompt_id", "not_hard")

    def run(count: int, out: Output) -> None:
        account(Selected(week.slice(0, 2), gone, {"prompts": {"in": count}}), out)
        out.json("report", {})

    made = commit(store, "rl", {"report": "json"}, partial(run, 3), "3" * 32)
    assert made.manifest.rows is not None
    assert (made.manifest.rows.rows_in, made.manifest.rows.reasons) == (3, {"not_hard": 1})
    with pytest.raises(FlywheelError, match="rows are lost: 4 prompt in, 2 out, 1 rejected"):
        commit(store, "rl", {"report": "json"}, partial(run, 4), "4" * 32)


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
