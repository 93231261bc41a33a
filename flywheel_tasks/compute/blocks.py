"""One pure function over many blocks, in block order.

A block is a small description (files, row ranges), and so is a result (counts, file records): rows stay in files,
so memory is bounded by what one block holds, whatever the size of the data.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from flywheel_tasks.compute import session
from flywheel_tasks.core.errors import FlywheelError

B = TypeVar("B")
R = TypeVar("R")

_STOP_SECONDS = 10
_LAST_WRITE_SECONDS = 0.5
"""A cancelled task counts as ended a moment before its process is gone."""


def map_blocks(
    fn: Callable[[B], R],
    blocks: Sequence[B],
    *,
    cpus: float = 1.0,
    gpus: float = 0.0,
    actors: int = 0,
    share: bool = True,
) -> Iterator[R]:
    """`fn` over `blocks`. One block, one core, or work not worth sharing runs right here; more goes through Ray.

    Starting Ray takes some ten seconds, so a caller who knows that the work takes less says `share=False`. Plain blocks
    are Ray tasks. With `actors` they go through a Ray Data actor pool of that size, whose workers stay up for all
    blocks, so what `fn` caches in its process (a model) is loaded once in each. `cpus` and `gpus` are one worker's.
    """
    if len(blocks) <= 1 or not share or (session.cpus() < 2 and not os.environ.get("RAY_ADDRESS")):
        yield from map(fn, blocks)
        return
    ray = session.ensure()
    outcomes = _actor_pool(fn, blocks, cpus, gpus, actors) if actors else _tasks(fn, blocks, cpus, gpus)
    try:
        for result, failure in outcomes:
            if failure is not None:
                raise failure
            yield result
    except ray.exceptions.RayError as error:
        last = str(error).strip().splitlines()[0][:300]
        raise FlywheelError(
            f"a worker failed ({last}): see its log; if it ran out of memory, use smaller blocks"
        ) from error


def _guarded(fn: Callable[[B], R], block: B) -> tuple[R | None, FlywheelError | None]:
    """What is meant for people travels as a value: raised in a worker, Ray would wrap it in pages of its own."""
    try:
        return fn(block), None
    except FlywheelError as error:
        return None, error


def _tasks(fn: Callable[[B], R], blocks: Sequence[B], cpus: float, gpus: float) -> Iterator[Any]:
    """Ray tasks, a bounded number ahead of the reader. Ray Data would add two resident processes and seconds of
    start-up to move descriptions of a few hundred bytes."""
    import ray

    # Airflow alone retries, with a fresh attempt: a task that Ray ran again would trip over its own files.
    task = ray.remote(max_retries=0, num_cpus=cpus, num_gpus=gpus)(_guarded)
    ahead = max(2 * int(ray.cluster_resources().get("CPU", 1) / max(cpus, 0.1)), 2)
    running: deque[Any] = deque()
    try:
        for block in blocks:
            running.append(task.remote(fn, block))
            if len(running) >= ahead:
                yield ray.get(running[0])
                running.popleft()
        while running:
            yield ray.get(running[0])
            running.popleft()
    finally:
        _stop(ray, list(running))


def _stop(ray: Any, running: list[Any]) -> None:
    """End what still runs and wait for it: a cancelled stage removes its files, and nothing may write them again."""
    for reference in running:
        ray.cancel(reference, force=True)
    if running:
        ray.wait(running, num_returns=len(running), timeout=_STOP_SECONDS)
        time.sleep(_LAST_WRITE_SECONDS)


def _actor_pool(fn: Callable[[B], R], blocks: Sequence[B], cpus: float, gpus: float, actors: int) -> Iterator[Any]:
    import ray.data

    shipped = list(blocks)

    class Worker:
        def __call__(self, row: dict[str, int]) -> dict[str, object]:
            return {"outcome": _guarded(fn, shipped[row["item"]])}

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    dataset = ray.data.from_items(list(range(len(shipped))), override_num_blocks=len(shipped))
    pool = ray.data.ActorPoolStrategy(size=actors)
    for row in dataset.map(Worker, compute=pool, num_cpus=cpus, num_gpus=gpus, max_restarts=0).iter_rows():
        yield row["outcome"]
