"""One optimiser step: micro-batches forward and backward, one sum over the workers, clip, update.

Workers hold equal copies of what is trained and add up their gradients once per step, after the last micro-batch.
torch's DistributedDataParallel would do the same in buckets during the backward pass; but packed batches give workers
passes of unequal size, LoRA's gradient is under a percent of the model, and an fp32 sum that we own serves bf16 masters
too. Sharded models (FSDP2) reduce in their own hooks, at the last micro-batch only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn

from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.training import batching
from flywheel_tasks.training.optim import Optimiser
from flywheel_tasks.training.task import Loss, Step, Task

_BUCKET = 1 << 24
_NAMED_ROWS = 8


@dataclass(frozen=True)
class World:
    """The workers of a run, as one of them sees them."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009  immutable
    sharded: bool = False

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over the workers, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


class NotFinite(FlywheelError):
    """A loss or a gradient that is no number: the update was not made."""


def run_step(
    module: nn.Module,
    task: Task,
    optimiser: Optimiser,
    table: pa.Table,
    at: Step,
    world: World,
    *,
    budget: int,
    clip: float,
    share: float,
) -> dict[str, float]:
    """Train on one global batch. The metrics returned are of the whole batch, the same on every worker."""
    began = time.monotonic()
    parts = batching.cut(table.column("cost").to_numpy(), budget, world.size)
    whole = float(np.sum(table.column("count").to_numpy()))
    if whole <= 0:
        raise FlywheelError(f"step {at.step}: no row of the batch counts (all advantages or labels are missing)")
    torch.manual_seed(_seed(at, world.rank))
    losses = [_backward(module, task, table, rows, at, world, whole, last) for rows, last in _ends(parts[world.rank])]
    sums = world.add_up(_vector(task, losses, parts, world))
    metrics, bad = _read(task, sums.tolist(), parts, whole)
    if bad:
        optimiser.forget_gradients()
        raise NotFinite(f"the loss is not a number at step {at.step} (rows {_names(table, bad)})")
    if not world.sharded:
        for bucket in _buckets(optimiser.gradients()):
            _add_up_bucket(bucket, world)
    norm = optimiser.clip(clip)
    if not math.isfinite(norm):
        optimiser.forget_gradients()
        everything = np.arange(table.num_rows).tolist()
        raise NotFinite(f"the gradient is not a number at step {at.step} (rows {_names(table, everything)})")
    optimiser.step(share)
    tokens = float(np.sum(table.column("tokens").to_numpy()))
    seconds = time.monotonic() - began
    return metrics | {"grad_norm": norm, "tokens": tokens, "tokens_per_s": tokens / seconds, "step_s": seconds,
                      "computed_share": metrics["computed_share"] / tokens}  # fmt: skip


def _ends(micro: Sequence[batching.Indices]) -> Iterator[tuple[batching.Indices, bool]]:
    for i, rows in enumerate(micro):
        yield rows, i == len(micro) - 1


def _backward(
    module: nn.Module,
    task: Task,
    table: pa.Table,
    rows: batching.Indices,
    at: Step,
    world: World,
    whole: float,
    last: bool,
) -> Loss | None:
    """Forward and backward of one micro-batch. A worker without rows must still meet a sharded model's collectives."""
    if world.sharded:
        module.set_requires_gradient_sync(last)  # type: ignore[operator]
    if not len(rows) and not world.sharded:
        return None
    loss = task.loss(module, table.take(rows if len(rows) else [0]), at)
    weight = (world.size if world.sharded else 1) / whole if len(rows) else 0.0
    if loss.total.requires_grad:
        (loss.total * weight).backward()
    return loss if len(rows) else None


def _vector(task: Task, losses: Sequence[Loss | None], parts: batching.Cut, world: World) -> Tensor:
    """Everything that must be added over the workers, in one vector: a step costs one small collective."""
    names, micro = task.metrics, len(parts[0])
    vector = torch.zeros(2 + 2 * len(names) + world.size * micro, dtype=torch.float64)
    flags = vector[2 + 2 * len(names) :].view(world.size, micro)
    for i, loss in enumerate(losses):
        if loss is None:
            continue
        total = float(loss.total.detach())
        if not math.isfinite(total):
            flags[world.rank, i] = 1
            continue
        vector[0] += total
        vector[1] += loss.computed
        for j, name in enumerate(names):
            value, weight = loss.sums.get(name, (0.0, 0.0))
            vector[2 + 2 * j] += value
            vector[3 + 2 * j] += weight
    return vector.to(world.device)


def _read(task: Task, sums: list[float], parts: batching.Cut, whole: float) -> tuple[dict[str, float], list[int]]:
    """The batch's metrics, and the rows of micro-batches whose loss is no number."""
    names = task.metrics
    metrics = {"loss": sums[0] / whole, "computed_share": sums[1]}
    for j, name in enumerate(names):
        value, weight = sums[2 + 2 * j], sums[3 + 2 * j]
        if weight:
            metrics[name] = value / weight
    flags = iter(sums[2 + 2 * len(names) :])
    bad = [int(i) for part in parts for rows in part if next(flags) for i in rows]
    return metrics, bad


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for gradient in gradients:
        bucket.append(gradient)
        if sum(g.numel() for g in bucket) >= _BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _add_up_bucket(bucket: list[Tensor], world: World) -> None:
    if world.size == 1:
        return
    flat = world.add_up(torch.cat([gradient.flatten() for gradient in bucket]))
    for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _names(table: pa.Table, rows: Sequence[int]) -> str:
    names = table.column("row_id").take(sorted(rows)).to_pylist()
    more = f" and {len(names) - _NAMED_ROWS} more" if len(names) > _NAMED_ROWS else ""
    return ", ".join(names[:_NAMED_ROWS]) + more


def _seed(at: Step, rank: int) -> int:
    """Dropout and the like depend on (seed, step, worker) alone, so a resumed step draws what it drew before."""
    return int(np.random.SeedSequence((at.seed, at.step, rank)).generate_state(1)[0])
