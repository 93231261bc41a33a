"""Start the loop on Ray Train, pass its metrics on while it runs, and say in one line what went wrong.

Light to import: Ray and torch are loaded when something is trained.
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flywheel_tasks.compute import session
from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.core.storage import Storage
from flywheel_tasks.training import state
from flywheel_tasks.training.config import PlacementConfig, TrainingConfig
from flywheel_tasks.training.rows import RowFile
from flywheel_tasks.training.task import Hook, Source, Task

if TYPE_CHECKING:
    from flywheel_tasks.training.loop import Job

_POLL_SECONDS = 0.2
_STATE = "state"
_KEPT_STATES = 2
_TIMES = ("step_s", "tokens_per_s")
OnMetrics = Callable[[int, Mapping[str, float]], None]


@dataclass
class Trained:
    """What a run gave: its published models by step, and the metrics of every step."""

    folder: str
    history: list[dict[str, float]] = field(default_factory=list)
    stopped: str | None = None
    """Why a hook ended the run before its last step."""
    published: Sequence[state.Published] = ()

    @property
    def steps(self) -> int:
        return len(self.history)

    @property
    def metrics(self) -> dict[str, float]:
        """Those of the last step."""
        return self.history[-1] if self.history else {}

    def fetch(self, folder: Path, model: state.Published | None = None) -> None:
        """Copy a published model (the last one unless told) to a local folder."""
        state.fetch(self.folder, model or self.published[-1], folder)


def train(
    task: Task,
    rows: RowFile | None,
    config: TrainingConfig,
    placement: PlacementConfig,
    *,
    seed: int,
    folder: str,
    on_metrics: OnMetrics | None = None,
    source: Callable[[], Source] | None = None,
    hooks: Sequence[Callable[[], Hook]] = (),
) -> Trained:
    """Train `task` on `rows`, or on the batches of `source`, going on from what an earlier attempt left in `folder`.

    `on_metrics` is called once per optimiser step, in order, from this thread; after a resume it first sees the steps
    that the earlier attempt finished, so a curve is whole. When a worker died, it sees a step that is done again only
    if that came out otherwise. The last outcome of a step is the run's, and what the dead worker did beyond is not.
    """
    from flywheel_tasks.training.loop import Job

    job = Job(task, config, placement, seed, folder, rows, source, tuple(hooks))
    trained = Trained(folder)
    with tempfile.TemporaryDirectory(prefix="flywheel-train-") as scratch:
        lines = Path(scratch) / "lines.jsonl"
        lines.touch()
        failed = None
        told: dict[int, dict[str, float]] = {}
        for line in _watch(_fit(job, lines), lines):
            failed = failed or line.get("failed")
            if failed:
                continue
            del trained.history[line["step"] :]
            trained.history.append(line["metrics"])
            trained.stopped = line.get("stopped")
            outcome = untimed(trained.metrics)
            if on_metrics and told.get(trained.steps) != outcome:
                told[trained.steps] = outcome
                on_metrics(trained.steps, trained.metrics)
    if failed:
        raise FlywheelError(f"training stopped: {failed}, in {folder}")
    trained.published = state.published(folder)
    return trained


def untimed(metrics: Mapping[str, float]) -> dict[str, float]:
    """What a report may hold of a step: an artifact is the same whoever makes it, and no two runs take the same time.
    Times go to tracking."""
    return {name: value for name, value in metrics.items() if name not in _TIMES and not name.startswith("seconds/")}


def _watch(outcome: _Outcome, lines: Path) -> Iterator[dict[str, Any]]:
    """Lines as the run reports them, until it has ended and all are read; then its error, if it had one."""
    with lines.open("rb") as stream:
        while True:
            ended = outcome.thread.is_alive() is False
            while (text := stream.readline()).endswith(b"\n"):
                yield json.loads(text)
            stream.seek(-len(text), os.SEEK_CUR)  # the rest of a line that is being written
            if ended:
                break
            outcome.thread.join(_POLL_SECONDS)
    if outcome.error is not None:
        raise _plain(outcome.error, outcome.deadline_s) from outcome.error


@dataclass
class _Outcome:
    thread: threading.Thread
    deadline_s: float
    error: BaseException | None = None


def _fit(job: Job, lines: Path) -> _Outcome:
    """Start Ray Train in a thread of its own: this one stays free for metrics and for signals."""
    session.ensure()
    _settings(job.placement)
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from flywheel_tasks.training.group import GroupConfig
    from flywheel_tasks.training.worker import Lines, worker

    placement, storage = job.placement, Storage(job.folder)
    cpus = placement.cpus or (1.0 if os.environ.get("RAY_ADDRESS") else session.cpus() / placement.workers)
    trainer = TorchTrainer(
        worker,
        train_loop_config={"job": job, "run": secrets.token_hex(4), "threads": max(int(cpus), 1)},
        torch_config=GroupConfig(
            backend="nccl" if placement.gpus else "gloo", timeout_s=max(int(placement.deadline_s), 1)
        ),
        scaling_config=ScalingConfig(
            num_workers=placement.workers,
            use_gpu=placement.gpus > 0,
            resources_per_worker={"CPU": cpus, **({"GPU": placement.gpus} if placement.gpus else {})},
        ),
        run_config=RunConfig(
            name=_STATE,
            storage_path=storage.root,
            storage_filesystem=storage.fs,
            checkpoint_config=CheckpointConfig(num_to_keep=_KEPT_STATES),
            failure_config=FailureConfig(max_failures=placement.worker_failures, controller_failure_limit=0),
            callbacks=[Lines(str(lines))],
        ),
    )

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            outcome.error = error

    outcome = _Outcome(threading.Thread(target=fit, name="ray-train", daemon=True), placement.deadline_s)
    outcome.thread.start()
    return outcome


def _settings(placement: PlacementConfig) -> None:
    """Ray Train reads these from the environment: hung workers, and polling that does not cost a short run minutes."""
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(placement.deadline_s)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(placement.deadline_s)
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(placement.deadline_s)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(_POLL_SECONDS))
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")


def _plain(error: BaseException, deadline_s: float) -> FlywheelError:
    """What a person can act on, out of Ray's layers."""
    failures = getattr(error, "worker_failures", None) or {}
    for rank, failure in sorted(failures.items()):
        cause = getattr(failure, "_base_exc", failure)
        if isinstance(cause, FlywheelError):
            return cause
        last = next((text for text in reversed(str(cause).strip().splitlines()) if text.strip()), type(cause).__name__)
        if "ActorDied" in type(cause).__name__ or "died" in str(cause):
            return FlywheelError(
                f"training worker {rank} died, or did nothing for {deadline_s:g} s and was ended: see its log; the "
                "next attempt goes on from its last checkpoint"
            )
        return FlywheelError(f"training failed on worker {rank}: {type(cause).__name__}: {last[:300]}")
    last = next((text for text in reversed(str(error).strip().splitlines()) if text.strip()), type(error).__name__)
    return FlywheelError(f"training failed: {last[:300]}")
