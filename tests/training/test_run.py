"""The loop on Ray Train: real workers, killed and hung ones included."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flywheel_tasks.compute import session
from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.training import run
from flywheel_tasks.training.run import Trained, train
from tests.training import bags

EXACT: dict[str, Any] = {"epochs": 2, "save_every": 3, "token_budget": 200}


@pytest.fixture(scope="module", autouse=True)
def ray_of_these_tests() -> Iterator[None]:
    ray = session.ensure()
    yield
    ray.shutdown()


def fit(folder: Path, **settings: Any) -> tuple[Trained, list[tuple[int, float]]]:
    job = bags.job(folder, **settings)
    seen: list[tuple[int, float]] = []
    trained = train(
        job.task,
        job.rows,
        job.config,
        job.placement,
        seed=job.seed,
        folder=job.folder,
        on_metrics=lambda step, metrics: seen.append((step, metrics["loss"])),
        hooks=job.hooks,
    )
    return trained, seen


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run without Ray and without interruption."""
    return bags.losses_of(bags.run(tmp_path_factory.mktemp("straight"), what=bags.task(dropout=0.3), **EXACT))


def test_a_run_on_ray_train_gives_what_the_loop_gives(tmp_path: Path, straight: list[float]) -> None:
    trained, seen = fit(tmp_path, what=bags.task(dropout=0.3), **EXACT)
    assert seen == [(i + 1, loss) for i, loss in enumerate(straight)]
    assert trained.steps == 12
    assert [p.step for p in trained.published] == [12]
    trained.fetch(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_killed_run_goes_on_in_the_next_attempt_to_the_last_bit(tmp_path: Path, straight: list[float]) -> None:
    flag = str(tmp_path / "killed")
    killed = bags.task(dropout=0.3, hurt=partial(bags.kill_once, at=7, flag=flag))
    with pytest.raises(FlywheelError, match="training worker 0 died"):
        fit(tmp_path, what=killed, **EXACT)
    trained, seen = fit(tmp_path, what=killed, **EXACT)
    same = sum(loss == straight[step - 1] for step, loss in seen)
    print(f"losses equal to the last bit: {same} of {len(straight)}")
    assert seen == [(i + 1, loss) for i, loss in enumerate(straight)]
    assert trained.steps == 12


@pytest.mark.slow
def test_a_killed_worker_is_survived_inside_an_attempt_without_doubled_steps(
    tmp_path: Path, straight: list[float]
) -> None:
    killed = bags.task(dropout=0.3, hurt=partial(bags.kill_once, at=8, flag=str(tmp_path / "killed")))
    _, seen = fit(tmp_path, what=killed, worker_failures=1, **EXACT)
    assert seen == [(i + 1, loss) for i, loss in enumerate(straight)]


def line(step: int, loss: float, **more: Any) -> dict[str, Any]:
    return {"step": step, "metrics": {"loss": loss, "step_s": time.monotonic()}, **more}


def test_steps_that_come_out_otherwise_when_they_are_done_again_are_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker dies after step 5, whose state of step 2 the next one takes up: what it makes of step 3 is new, and at
    step 4 it is told to stop."""
    done = [line(0, 0.9), line(1, 0.8)]
    first = [line(2, 0.7), line(3, 0.6), line(4, 0.5)]
    second = [line(2, 0.7), line(3, 0.1, stopped="enough")]

    def reported(job: Any, lines: Path) -> Any:
        lines.write_text("".join(json.dumps(one) + "\n" for one in [*done, *first, *done, *second]))
        ended = threading.Thread(target=int)
        ended.start()
        return run._Outcome(ended, 900.0)

    monkeypatch.setattr(run, "_fit", reported)
    trained, seen = fit(tmp_path, worker_failures=1)
    assert (trained.steps, trained.stopped) == (4, "enough")
    assert [metrics["loss"] for metrics in trained.history] == [0.9, 0.8, 0.7, 0.1]
    assert trained.metrics == second[-1]["metrics"]
    assert seen == [(1, 0.9), (2, 0.8), (3, 0.7), (4, 0.6), (5, 0.5), (4, 0.1)]


@pytest.mark.slow
def test_two_workers_make_the_update_of_one(tmp_path: Path) -> None:
    """Also with fewer rows in the last batch than workers: 49 rows leave a batch of one."""
    settings = {"epochs": 2, "batch": 8, "token_budget": 120, "rows_table": bags.table(49)}
    alone = bags.losses_of(bags.run(tmp_path / "one", **settings))
    _, seen = fit(tmp_path / "two", workers=2, **settings)
    assert np.allclose([loss for _, loss in seen], alone, rtol=1e-5)
    first_step(tmp_path, shard=False)


def first_step(folder: Path, shard: bool) -> None:
    """The gradient of one step of two workers is that of one."""
    settings = {"steps": 1, "batch": 8, "token_budget": 120}
    bags.run(folder / "step/one", **settings)
    (folder / "step/two").mkdir()
    fit(folder / "step/two", workers=2, shard=shard, **settings)
    assert bags.apart(bags.gradient(folder / "step/one"), bags.gradient(folder / "step/two")) < 1e-5


@pytest.mark.slow
def test_a_sharded_model_makes_the_update_of_one_worker_and_resumes(tmp_path: Path) -> None:
    settings = {"epochs": 2, "batch": 8, "token_budget": 120, "save_every": 3}
    alone = bags.losses_of(bags.run(tmp_path / "one", **settings))
    what = bags.task(hurt=partial(bags.kill_once, at=7, flag=str(tmp_path / "killed")))
    (tmp_path / "two").mkdir()
    with pytest.raises(FlywheelError):
        fit(tmp_path / "two", what=what, workers=2, shard=True, **settings)
    _, seen = fit(tmp_path / "two", what=what, workers=2, shard=True, **settings)
    assert np.allclose([loss for _, loss in seen], alone, rtol=1e-5)
    first_step(tmp_path, shard=True)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_hung_worker_fails_within_the_deadline(tmp_path: Path, workers: int) -> None:
    mark = tmp_path / "hung"
    with pytest.raises(FlywheelError, match=r"died, or did nothing for 20 s|[Tt]imed out|Timeout"):
        fit(tmp_path, what=bags.task(hurt=partial(bags.hang, at=2, mark=str(mark))), workers=workers, deadline_s=20)
    assert time.time() - mark.stat().st_mtime < 60, "20 s, and some for Ray to notice and to clean up"


@pytest.mark.slow
def test_nan_is_one_line_for_the_user(tmp_path: Path) -> None:
    with pytest.raises(
        FlywheelError, match=r"not a number at step \d+ \(rows .*pair-007.*last good checkpoint is step"
    ):
        fit(tmp_path, what=bags.task(poison="pair-007"), **EXACT)
