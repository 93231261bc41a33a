"""Values of every row under the model before its first step, computed once and kept: DPO's reference (Sec. 2.4.2).

The model that training starts from is the reference, so it never needs a place in memory beside the policy. Each worker
computes its share, the pieces lie in the run's folder, and a resumed run reads them instead.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from flywheel_tasks.core.storage import Storage
from flywheel_tasks.training import batching
from flywheel_tasks.training.rows import take
from flywheel_tasks.training.step import World
from flywheel_tasks.training.task import Task

PIECE = pa.schema([pa.field("row", pa.int64()), pa.field("values", pa.list_(pa.float32()))])
_BLOCK = 1024


def prepare(
    task: Task, module: nn.Module, table: pa.Table, folder: str, world: World, budget: int, alive: Callable[[], None]
) -> pa.Array:
    """`task.prepare` of every row, in row order."""
    storage = Storage(folder)
    mine = _name(world.rank, world.size)
    here = storage.read(mine)
    found = torch.tensor([float(here is not None)], device=world.device)
    if world.add_up(found).item() < world.size:
        storage.put(mine, _compute(task, module, table, world, budget, alive))
        # Reading the sum is what waits: on GPUs the call itself returns before the other workers have met it.
        world.add_up(torch.zeros(1, device=world.device)).item()
    pieces = [_read(storage.read(_name(rank, world.size))) for rank in range(world.size)]
    together = pa.concat_tables(pieces).sort_by("row")
    return together.column("values").combine_chunks()


def _compute(
    task: Task, module: nn.Module, table: pa.Table, world: World, budget: int, alive: Callable[[], None]
) -> bytes:
    if task.prepare is None:
        raise ValueError("the task has nothing to prepare")
    rows, values = [], []
    was_training = module.training
    module.eval()
    costs = table.column("cost").to_numpy()
    with torch.no_grad():
        for first in range(0, table.num_rows, _BLOCK):
            block = np.arange(first, min(first + _BLOCK, table.num_rows))
            for micro in batching.cut(costs[block], budget, world.size)[world.rank]:
                if not len(micro) and not world.sharded:
                    continue
                alive()
                found = task.prepare(module, take(table, block[micro if len(micro) else [0]]))
                if len(micro):  # a worker without rows still meets a sharded model's collectives
                    values += found
                    rows += block[micro].tolist()
    module.train(was_training)
    piece = pa.table({"row": rows, "values": values}, schema=PIECE)
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, PIECE) as writer:
        writer.write_table(piece)
    return buffer.getvalue()


def _read(raw: bytes | None) -> pa.Table:
    if raw is None:
        raise FileNotFoundError("another worker's prepared values are gone: the run's folder was changed while it ran")
    return pa.ipc.open_file(pa.BufferReader(raw)).read_all()


def _name(rank: int, size: int) -> str:
    return f"prepared/{rank}-of-{size}.arrow"
