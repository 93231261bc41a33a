"""One pure function over many blocks, in block order.

A block is a small description (files, row ranges), and so is a result (counts, file records): rows stay in files,
so memory is bounded by what one block holds, whatever the size of the data.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from flywheel_tasks.compute import session
from flywheel_tasks.core.errors import FlywheelError

B = TypeVar("B")
R = TypeVar("R")


def map_blocks(
    fn: Callable[[B], R], blocks: Sequence[B], *, cpus: float = 1.0, gpus: float = 0.0, actors: int = 0
) -> Iterator[R]:
    """`fn` over `blocks`. One block, or one core, runs right here; more go through Ray Data.

    Starting Ray takes longer than a small block does, so callers cut blocks worth several seconds of work. With
    `actors`, that many workers stay up for all blocks, so what `fn` caches in its process (a model) is loaded once in
    each; `cpus` and `gpus` are what one worker holds.
    """
    if len(blocks) <= 1 or (session.cpus() < 2 and not os.environ.get("RAY_ADDRESS")):
        yield from map(fn, blocks)
        return
    yield from _through_ray(fn, list(blocks), cpus, gpus, actors)


def _through_ray(fn: Callable[[B], R], blocks: list[B], cpus: float, gpus: float, actors: int) -> Iterator[R]:
    session.ensure()
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)

    def one(row: dict[str, int]) -> dict[str, object]:
        try:
            return {"result": fn(blocks[row["item"]])}
        except FlywheelError as error:  # travels as a value, or Ray would wrap it in pages of its own
            return {"result": None, "failure": error}

    class Worker:
        def __call__(self, row: dict[str, int]) -> dict[str, object]:
            return one(row)

    dataset = ray.data.from_items(list(range(len(blocks))), override_num_blocks=len(blocks))
    # Airflow alone retries, with a fresh attempt: a task that Ray ran again would trip over its own files.
    workers: Any = {"fn": one, "max_retries": 0}
    if actors:
        pool = ray.data.ActorPoolStrategy(size=actors)
        workers = {"fn": Worker, "compute": pool, "max_restarts": 0, "max_task_retries": 0}
    try:
        for row in dataset.map(**workers, num_cpus=cpus, num_gpus=gpus).iter_rows():
            if row.get("failure") is not None:
                raise row["failure"]
            yield row["result"]
    except ray.exceptions.RayError as error:
        last = str(error).strip().splitlines()[0][:300]
        raise FlywheelError(
            f"a worker failed ({last}): see its log; if it ran out of memory, use smaller blocks"
        ) from error
