"""Where the parts of a run are: what learners and engines ask of Ray together, and who comes first on a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flywheel_tasks.compute import session
from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.herding import reward, rl_remote, rollouts
from flywheel_tasks.models import engine_link
from flywheel_tasks.training import run
from flywheel_tasks.training.loop import Job
from tests.herding import rl_world
from tests.models.noted_ray import Noted
from tests.training import bags


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Noted:
    noted = Noted()
    monkeypatch.setattr(session, "ensure", lambda: noted)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return noted


def learners(monkeypatch: pytest.MonkeyPatch, job: Job, folder: Path) -> float:
    """The cores that the learners of a job ask for."""
    # Ray reads once, when it is imported, whether its callers carry a token: later tests start one that asks for it.
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    import ray.train.torch

    asked: list[float] = []

    class Trainer:
        def __init__(self, *_: Any, scaling_config: Any, **__: Any) -> None:
            asked.append(scaling_config.num_workers * scaling_config.resources_per_worker["CPU"])

        def fit(self) -> None: ...

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Trainer)
    run._fit(job, folder / "lines").thread.join()
    return sum(asked)


@pytest.mark.parametrize(("replicas", "workers"), [(2, 1), (4, 2)])
def test_learners_and_replicas_of_an_engine_fit_on_one_machine_together(
    ray: Noted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, replicas: int, workers: int
) -> None:
    """Else the learners wait for cores that the engines keep until the run is over."""
    for _ in range(replicas):
        engine_link.connect(tensor_parallel=1, replicas=replicas)
    wanted = learners(monkeypatch, bags.job(tmp_path, workers=workers), tmp_path)
    assert sum(one["num_cpus"] for one in ray.asked) + wanted <= session.cpus()


@pytest.mark.parametrize("address", ["", "10.0.0.1:6379"])
def test_the_rollouts_engines_know_that_they_are_on_a_cluster(
    ray: Noted, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr(rl_remote.Far, "_wait", lambda *_: None)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    setup = SimpleNamespace(engine=rl_world.config().engine)
    with rl_remote.rollouts(setup, gpus=1, deadline_s=9):  # type: ignore[arg-type]
        [asked] = ray.asked
    assert asked["num_gpus"] == 1
    assert asked["runtime_env"]["env_vars"].get("RAY_ADDRESS", "") == address


@pytest.mark.parametrize("gpus", [0, 2])
def test_rollouts_that_do_not_start_name_the_key_that_waits_for_them(
    ray: Noted, monkeypatch: pytest.MonkeyPatch, gpus: int
) -> None:
    late(monkeypatch)
    setup = SimpleNamespace(engine=rl_world.config().engine.model_copy(update={"start_seconds": 30}))
    with (
        pytest.raises(FlywheelError, match=r"'ready' in 30 s: .*\(rl\.engine\.start_seconds allows more\)") as told,
        rl_remote.rollouts(setup, gpus=gpus, deadline_s=9),  # type: ignore[arg-type]
    ):
        pass
    assert ("rl.rollout_gpus (2) are not free" in str(told.value)) == (gpus == 2)


def test_rollouts_that_hang_name_the_deadline_of_the_learners(monkeypatch: pytest.MonkeyPatch) -> None:
    late(monkeypatch)
    actor = SimpleNamespace(batch=SimpleNamespace(remote=lambda *_: None))
    with pytest.raises(FlywheelError, match=r"'batch' in 9 s: .*\(rl\.placement\.deadline_s allows more\)"):
        rl_remote.Far(actor, 9).ask("batch", 0, 0)


def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Ray is asked for is not there in time."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # as in `learners`
    import ray

    def get(*_: Any, **__: Any) -> None:
        raise ray.exceptions.GetTimeoutError("late")

    monkeypatch.setattr(ray, "get", get)


@pytest.mark.parametrize("gpu", [True, False])
def test_on_a_gpu_the_scoring_models_are_there_before_the_engine_takes_the_rest(
    monkeypatch: pytest.MonkeyPatch, gpu: bool
) -> None:
    came: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(reward, "preference_scorer", came.append)
    monkeypatch.setattr(reward, "pairwise_scorer", came.append)

    class Engine:
        def __enter__(self) -> None:
            came.append("engine")

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(rollouts, "open_engine", lambda policy, config: Engine())
    setup = SimpleNamespace(policy=None, engine=None, seed=1, reward_model="pointwise", pairwise_model="pairwise")
    with rollouts.Rollouts(setup):  # type: ignore[arg-type]
        assert came == (["pointwise", "pairwise", "engine"] if gpu else ["engine"])
