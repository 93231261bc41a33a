"""One pure function over many blocks, in block order.

A block is a small description (files, row ranges), and so is a result (counts, file records): rows stay in files,
so memory is bounded by what one block holds, whatever the size of the data.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from flywheel_tasks.compute import session

B = TypeVar("B")
R = TypeVar("R")


def map_blocks(fn: Callable[[B], R], blocks: Sequence[B], *, cpus: float = 1.0) -> Iterator[R]:
    """`fn` over `blocks`. One block, or one core, runs right here; more go through Ray Data.

    Starting Ray takes longer than a small block does, so callers cut blocks worth several seconds of work.
    """
    if len(blocks) <= 1 or (session.cpus() < 2 and not _cluster()):
        yield from map(fn, blocks)
        return
    yield from _through_ray(fn, blocks, cpus)


def _cluster() -> bool:
    import os

    return bool(os.environ.get("RAY_ADDRESS"))


def _through_ray(fn: Callable[[B], R], blocks: Sequence[B], cpus: float) -> Iterator[R]:
    session.ensure()
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    shipped = list(blocks)

    def one(row: dict[str, int]) -> dict[str, object]:
        return {"result": fn(shipped[row["item"]])}

    dataset = ray.data.from_items(list(range(len(shipped))), override_num_blocks=len(shipped))
    for row in dataset.map(one, num_cpus=cpus).iter_rows():
        yield row["result"]
