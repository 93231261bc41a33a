"""Prepared values are read only when all workers have written theirs."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor, nn

from flywheel_tasks.training import prepared, rows
from flywheel_tasks.training.step import World
from flywheel_tasks.training.task import Task


@dataclass(frozen=True)
class Later:
    """A sum as NCCL gives it: only who reads its value waits for the others."""

    meet: threading.Barrier

    def item(self) -> float:
        self.meet.wait(timeout=20)
        return 0.0


@dataclass(frozen=True)
class Gpus(World):
    meet: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))

    def add_up(self, tensor: Tensor) -> Any:
        return Later(self.meet)


def test_the_fastest_worker_waits_for_the_pieces_of_the_others(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(
        [rows.row(f"r{n}", [np.arange(n + 1, dtype=np.int32)], 1.0) for n in range(8)], rows.schema()
    )
    meet = threading.Barrier(2)

    def work(rank: int) -> pa.Array:
        def lengths(_: nn.Module, part: pa.Table) -> list[np.ndarray]:
            time.sleep(0.2 * rank)
            return [np.array([n], np.float32) for n in part["tokens"].to_pylist()]

        task = Task(None, None, None, prepare=lengths)  # type: ignore[arg-type]
        world = Gpus(rank, 2, meet=meet)
        return prepared.prepare(task, nn.Linear(1, 1), table, f"file://{tmp_path}", world, 18, lambda: None)

    with ThreadPoolExecutor(2) as both:
        found = list(both.map(work, range(2)))
    assert [one.to_pylist() for one in found] == [[[n + 1.0] for n in range(8)]] * 2
