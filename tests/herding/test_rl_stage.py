"""The stage `rl` whole: a real engine, real preference models, learners on Ray Train; killed and hung ones too."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest

from flywheel_tasks.compute import session
from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.store import Store
from flywheel_tasks.herding.rl_remote import ask_as_learner, rollouts
from flywheel_tasks.training.config import PlacementConfig
from tests.herding import rl_world
from tests.preherding.conftest import Given

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ENGINE, LEARNER, ROLLOUTS = "engine_worker", "RayTrainWorker", "_Process"


@pytest.fixture(scope="module", autouse=True)
def ray_of_these_tests() -> Iterator[None]:
    with rl_world.unpinned():
        ray = session.ensure()
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def judges(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    kinds = ("pointwise", "pairwise")
    return {kind: rl_world.judge(tiny_model, tmp_path_factory.mktemp(kind), kind) for kind in kinds}


@pytest.fixture
def curve(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, int]]:
    """What goes to tracking, as it comes."""
    seen: list[tuple[str, float, int]] = []
    log = Output.metric

    def metric(self: Output, name: str, value: float, step: int | None = None) -> None:
        if step is not None:
            seen.append((name, value, step))
        log(self, name, value, step)

    monkeypatch.setattr(Output, "metric", metric)
    return seen


def processes(word: str) -> list[psutil.Process]:
    """Ours that live, by what they call themselves."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if word in " ".join(process.cmdline()) and process not in OTHERS:
                found.append(process)
    return found


OTHERS: list[psutil.Process] = []


@pytest.fixture(scope="module", autouse=True)
def engines_of_other_tests() -> None:
    """An engine that the whole session shares is none of these tests'."""
    OTHERS[:] = processes(ENGINE)


def when(condition: Callable[[], bool], act: Callable[[], Any]) -> threading.Thread:
    def watch() -> None:
        until = time.monotonic() + 600
        while time.monotonic() < until:
            if condition():
                act()
                return
            time.sleep(0.05)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_two_learners_climb_and_every_prompt_is_accounted_for(
    store: Store, given: Given, characters: pa.Table, tiny_model: Path, judges: dict[str, Path], curve: list[Any]
) -> None:
    week = rl_world.week(24)
    old = [not (i % 5 == 0 or i == 8) and row for i, row in enumerate(week["near_policy"].to_pylist())]
    week = week.set_column(week.column_names.index("near_policy"), "near_policy", pa.array(old))
    made = rl_world.stage(
        store, given, characters, tiny_model, judges, prompts=week, placement={"workers": 2}, loss={"updates": 2},
    )  # fmt: skip
    counts, report = made.manifest.rows, made.json("report")
    assert counts is not None
    assert (counts.rows_in, counts.rows_out, counts.reasons) == (18, 17, {"older_version": 1})
    assert report["steps"] == 4
    assert set(report["guards"]) == {"2", "4"}
    kept = [step for step in (2, 4) if report["guards"][str(step)]["win_rate"] < 0.99]
    assert report["kept"] == kept
    names = {file.path.partition("/steps/")[2].split("/")[0] for file in made.manifest.outputs["steps"].files}
    assert names == {f"step-{step:06d}" for step in kept if step != report["chosen"]}
    assert report["served"][str(report["chosen"])]["probe/drift_mean"] < 0.12
    assert report["held_out"] == {"prompts": 5, "share": 1.0}
    assert {"model.safetensors", "tokenizer.json"} <= {
        file.path.rpartition("/")[2] for file in made.manifest.outputs["model"].files
    }
    steps = Counter(step for name, _, step in curve if name == "train/loss")
    assert steps == {1: 1, 2: 1, 3: 1, 4: 1}
    seen = {name for name, *_ in curve}
    assert not [name for name in report["first"] | report["last"] if name.startswith("seconds/")]
    assert {f"train/seconds/{part}" for part in ("generate", "score", "learn", "sync", "step")} <= seen
    assert {"train/kl", "train/clipped", "train/weight", "train/probe/drift_max", "train/guard/kl"} <= seen
    assert {"train/reward/preference", "train/reward/long", "train/guard/win_rate_pairwise"} <= seen


def test_a_killed_learner_resumes_and_a_killed_engine_is_replaced(
    store: Store, given: Given, characters: pa.Table, tiny_model: Path, judges: dict[str, Path], curve: list[Any]
) -> None:
    """The second attempt's curve holds every step once, those of the first attempt's checkpoint as they were."""

    def reached(step: int) -> Callable[[], bool]:
        return lambda: any(name == "train/loss" and at >= step for name, _, at in list(curve))

    def kill(word: str) -> Callable[[], object]:
        return lambda: [os.kill(p.pid, signal.SIGKILL) for p in processes(word)]  # type: ignore[func-returns-value]

    changes: dict[str, Any] = {"train": {"steps": 40}, "guardrail": {"every": 20}, "placement": {"save_every": 2}}
    killer = when(reached(5), kill(LEARNER))
    with pytest.raises(FlywheelError, match="worker 0 died"):
        rl_world.stage(store, given, characters, tiny_model, judges, **changes)
    killer.join()
    first, took = ({step: v for name, v, step in curve if name == f"train/{of}"} for of in ("loss", "step_s"))
    assert max(first) < 40
    until = time.monotonic() + 20
    while processes(ENGINE):
        assert time.monotonic() < until, "the engine outlives its attempt"
        time.sleep(0.1)
    curve.clear()
    killer = when(reached(max(first) + 4), kill(ENGINE))
    made = rl_world.stage(store, given, characters, tiny_model, judges, **changes)
    assert not killer.is_alive()
    losses, seconds = ([(step, v) for name, v, step in curve if name == f"train/{of}"] for of in ("loss", "step_s"))
    assert [step for step, _ in losses] == list(range(1, 41))
    kept = max(first) // 2 * 2 - 2
    assert kept >= 2
    assert [value for _, value in losses[:kept]] == [first[step] for step in range(1, kept + 1)]
    # A run from the start would give the same losses, but never the same times.
    assert [value for _, value in seconds[:kept]] == [took[step] for step in range(1, kept + 1)]
    assert made.json("report")["steps"] == 40


def test_hung_rollouts_are_an_error_within_the_deadline(
    tiny_model: Path, judges: dict[str, Path], characters: pa.Table
) -> None:
    setup = rl_world.setup(tiny_model, judges, characters)
    with rollouts(setup, gpus=0, deadline_s=6) as far:
        [process] = processes(ROLLOUTS)
        process.suspend()
        began = time.monotonic()
        with pytest.raises(FlywheelError, match="the rollouts gave no answer to 'probe_prompts' in 5 s"):
            far.ask("probe_prompts", 2)
        assert time.monotonic() - began < 15
        process.kill()


def test_an_engine_that_hangs_too_often_ends_the_run_in_one_line(
    tiny_model: Path, judges: dict[str, Path], characters: pa.Table
) -> None:
    engine = {"stall_seconds": 4.0, "restarts": 0}
    setup = rl_world.setup(tiny_model, judges, characters, engine=engine)
    with rollouts(setup, gpus=0, deadline_s=200) as far:
        ask_as_learner(far, PlacementConfig())  # these do share their memory
        [process] = processes(ENGINE)
        process.suspend()
        with pytest.raises(FlywheelError, match=r"1 engines were lost in one round, the last because it was silent"):
            far.ask("respond", rl_world.week(4), 2, "any")
