"""The one training loop: preference models, signal models, SFT, DPO and RL run through `run_loop` on every worker."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import torch
from torch import Tensor, nn

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.training import batching, prepared, shard, state
from flywheel_tasks.training.config import PlacementConfig, TrainingConfig
from flywheel_tasks.training.optim import Optimiser, rate
from flywheel_tasks.training.rows import RowFile, take
from flywheel_tasks.training.step import NotFinite, World, run_step
from flywheel_tasks.training.task import After, Hook, Source, Step, Stop, Task

_REPORT_SECONDS = 2.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """Everything a worker is told. Small: rows are in a file, weights in folders."""

    task: Task
    config: TrainingConfig
    placement: PlacementConfig
    seed: int
    folder: str
    """URI that outlives the attempt: prepared values and published models."""
    rows: RowFile | None = None
    source: Callable[[], Source] | None = None
    hooks: tuple[Callable[[], Hook], ...] = ()


class Link(Protocol):
    """How a worker speaks to whoever runs it."""

    def resume(self) -> AbstractContextManager[Path | None]:
        """The last checkpoint's folder, if there is one."""

    def report(self, lines: Sequence[Mapping[str, Any]], checkpoint: Path | None = None, step: int = 0) -> None:
        """Called by all workers together; what the first one says counts."""

    def alive(self) -> None:
        """Something was done: the deadline starts again."""


class FileSource:
    """Global batches from a file of rows: shuffled by (seed, epoch)."""

    def __init__(self, table: pa.Table, config: TrainingConfig, seed: int) -> None:
        self._table, self._batch, self._seed = table, config.batch, seed
        per_epoch = batching.steps_per_epoch(table.num_rows, config.batch)
        self.steps = min(per_epoch * config.epochs, config.steps or per_epoch * config.epochs)

    def batch(self, step: int) -> pa.Table:
        return take(self._table, batching.step_rows(self._table.num_rows, self._batch, step, self._seed))

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """The order follows from seed and step: there is nothing to take up."""


@dataclass
class _Run:
    """The moving parts of one worker's run."""

    module: nn.Module
    optimiser: Optimiser
    source: Source
    hooks: list[Hook]
    history: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0
    stopped: str | None = None
    published: int = -1
    """The last step whose model is published."""


def run_loop(job: Job, world: World, link: Link) -> None:
    """Train to the end, or to a hook's stop, from the last checkpoint if there is one."""
    run = _start(job, world, link)
    with link.resume() as checkpoint:
        if checkpoint is not None:
            _restore(run, checkpoint, world)
    unreported = list(run.history)
    saved, reported = run.step, time.monotonic()
    while run.step < run.source.steps and run.stopped is None:
        link.alive()
        table = run.source.batch(run.step)
        if table is None:
            break
        try:
            line = _step(job, run, world, table)
        except NotFinite as error:
            link.report([*unreported, {"failed": f"{error}; the last good checkpoint is step {saved}"}])
            return
        run.history.append(line)
        unreported.append(line)
        run.step += 1
        last = run.step >= run.source.steps or run.stopped is not None
        publish = last or (job.config.publish_every is not None and run.step % job.config.publish_every == 0)
        if publish:
            _publish(job, run, world, link)
        if last or run.step % job.placement.save_every == 0:
            _save(run, world, link, unreported)
            saved, reported, unreported = run.step, time.monotonic(), []
        elif _due(reported, world):
            link.report(unreported)
            reported, unreported = time.monotonic(), []
    if run.published != run.step:
        _publish(job, run, world, link)
    if saved < run.step:
        _save(run, world, link, unreported)
    elif unreported:
        link.report(unreported)


def _start(job: Job, world: World, link: Link) -> _Run:
    link.alive()
    torch.manual_seed(job.seed)
    module = shard.build(job.task, world) if world.sharded else job.task.build(world.device)
    module.train()
    if job.placement.checkpoint_layers:
        module.checkpoint_layers()  # type: ignore[operator]
    table = job.rows.open() if job.rows else None
    if table is not None and job.task.prepare is not None:
        values = prepared.prepare(job.task, module, table, job.folder, world, job.placement.token_budget, link.alive)
        table = table.append_column("prepared", values)
    if table is not None:
        source: Source = FileSource(table, job.config, job.seed)
    elif job.source is not None:
        source = job.source()
    else:
        raise InputError("train() needs rows or a source of batches")
    optimiser = Optimiser(
        module,
        learning_rate=job.config.learning_rate,
        weight_decay=job.config.weight_decay,
        sharded=world.sharded,
    )
    hooks = [make() for make in job.hooks]
    for hook in hooks:
        hook.start(module)
    return _Run(module, optimiser, source, hooks)


def _step(job: Job, run: _Run, world: World, table: pa.Table) -> dict[str, Any]:
    share = rate(run.step, run.source.steps, job.config.warmup, job.config.floor)
    metrics = run_step(
        run.module,
        job.task,
        run.optimiser,
        table,
        Step(run.step, job.seed, world.device, tuple(run.hooks)),
        world,
        budget=job.placement.token_budget,
        clip=job.config.clip,
        share=share,
    )
    metrics["learning_rate"] = job.config.learning_rate * share
    asked = None
    for hook in run.hooks:
        answer = hook.after_step(After(run.step, run.module, metrics, world.rank))
        if isinstance(answer, Stop):
            asked = answer.reason
        elif answer:
            metrics |= answer
    if run.hooks:
        wishes = world.add_up(torch.tensor([float(asked is not None)], device=world.device))
        if wishes.item():
            run.stopped = asked or "another worker's guardrail asked to stop"
    line: dict[str, Any] = {"step": run.step, "metrics": _numbers(run.step, metrics)}
    return line | {"stopped": run.stopped} if run.stopped else line


def _numbers(step: int, metrics: Mapping[str, float]) -> dict[str, float]:
    """Without those that are no number: the update is good, and a report can't hold them. How many is one more."""
    kept = {name: value for name, value in metrics.items() if math.isfinite(value)}
    if odd := sorted(metrics.keys() - kept.keys()):
        _log.warning("step %d: left out, since they are no numbers: %s", step, ", ".join(odd))
        kept["metrics_left_out"] = float(len(odd))
    return kept


def _publish(job: Job, run: _Run, world: World, link: Link) -> None:
    """Before the state is saved: a state never claims a model that is not there."""
    link.alive()
    with tempfile.TemporaryDirectory(prefix="flywheel-model-") as scratch:
        shard.write_model(run.module, job.task, Path(scratch), world)
        if world.rank == 0:
            last = run.history[-1]["metrics"] if run.history else {}
            state.publish(job.folder, run.step, Path(scratch), last)
    run.published = run.step


def _save(run: _Run, world: World, link: Link, lines: Sequence[Mapping[str, Any]]) -> None:
    link.alive()
    with tempfile.TemporaryDirectory(prefix="flywheel-state-") as scratch:
        checkpoint = Path(scratch) / "state"
        checkpoint.mkdir()
        if world.sharded or world.rank == 0:
            about = {
                "step": run.step,
                "workers": world.size if world.sharded else 1,
                "source": run.source.state(),
                "stopped": run.stopped,
                "published": run.published,
                "history": run.history if world.rank == 0 else [],
            }
            state.save(checkpoint, world.rank, _tensors(run), about)
        link.report(lines, checkpoint, run.step)


def _tensors(run: _Run) -> dict[str, Tensor]:
    hooked = {
        f"hook{i}/{name}": tensor.clone() for i, hook in enumerate(run.hooks) for name, tensor in hook.tensors().items()
    }
    return run.optimiser.state() | hooked


def _restore(run: _Run, folder: Path, world: World) -> None:
    shards, mine = (world.size, world.rank) if world.sharded else (1, 0)
    try:
        tensors, about = state.load(folder, mine)
    except FileNotFoundError:  # this worker may be new: the first one's part says how many there were
        tensors, about = state.load(folder, 0)
        if about["workers"] == shards:
            raise
    if about["workers"] != shards:
        raise InputError(
            f"the checkpoint of step {about['step']} is in {about['workers']} shards, this run has {world.size} "
            "workers: set placement.workers back, or delete the stage's folder under partial/ to start afresh"
        )
    run.optimiser.restore({n: t for n, t in tensors.items() if not n.startswith("hook")})
    for i, hook in enumerate(run.hooks):
        prefix = f"hook{i}/"
        hook.restore({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    run.source.restore(about["source"])
    run.step, run.stopped = about["step"], about["stopped"]
    run.published, run.history = about["published"], about["history"]


def _due(reported: float, world: World) -> bool:
    """Whether it is time to report, as the first worker's clock has it: all workers must report together."""
    due = torch.tensor([float(world.rank == 0 and time.monotonic() - reported > _REPORT_SECONDS)], device=world.device)
    return bool(world.add_up(due).item())
