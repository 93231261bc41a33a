"""One of two workers that spread a model of blocks: `python -m tests.training.whole RANK PORT FOLDER`. Writes down how
much its memory grew at most, in bytes, and the sum of what it was given."""

from __future__ import annotations

import json
import os
import re
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from flywheel_tasks.training import shard
from flywheel_tasks.training.step import World
from flywheel_tasks.training.task import Task

WIDTH, BLOCKS = 1024, 48
BYTES = 4 * BLOCKS * (WIDTH + 1) * WIDTH


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS)])
        self.once = nn.Buffer(torch.arange(WIDTH, dtype=torch.float32), persistent=False)


def build(device: torch.device) -> nn.Module:
    with device:
        return Tower()


def main(rank: int, port: str, folder: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=240))
    task = Task(build, lambda *_: None, lambda *_: None)  # type: ignore[arg-type,return-value]
    shard.build(Task(lambda device: nn.Linear(8, 8, device=device), task.loss, task.save), _world(rank))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _peak()
    torch.manual_seed(0)
    module = shard.build(task, _world(rank))
    grown = _peak() - before
    total = sum(float(p.full_tensor().double().sum()) for p in module.parameters())  # type: ignore[operator]
    total += float(module.once.double().sum())  # type: ignore[operator,union-attr]
    (folder / f"{rank}.json").write_text(json.dumps({"grown": grown, "total": total}))
    dist.destroy_process_group()


def _world(rank: int) -> World:
    return World(rank, 2, torch.device("cpu"), sharded=True)


def _peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
