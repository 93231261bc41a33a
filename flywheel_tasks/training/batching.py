"""Which rows make an optimiser step, and how a step is cut into micro-batches by tokens.

A step is defined by its global batch alone: `batch` rows of a shuffle that depends on (seed, epoch). How the batch is
cut for memory and for workers never changes the update, because losses are summed and divided by the count of the
whole batch. Within a batch rows are sorted by length and cut where a token budget is full, so rows of like length meet
and no micro-batch is larger than the memory it was promised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Cut = tuple[tuple[Indices, ...], ...]
"""`cut[worker]` is that worker's micro-batches, as many for every worker."""


def steps_per_epoch(rows: int, batch: int) -> int:
    """Optimiser steps that see every row once; the last one may be smaller."""
    return math.ceil(rows / batch)


def step_rows(rows: int, batch: int, step: int, seed: int) -> Indices:
    """The rows of optimiser step `step` (from 0): the same for the same (seed, epoch), whoever asks."""
    epoch, position = divmod(step, steps_per_epoch(rows, batch))
    return _order(rows, epoch, seed)[position * batch : (position + 1) * batch]


@lru_cache(maxsize=2)
def _order(rows: int, epoch: int, seed: int) -> Indices:
    return np.random.default_rng((seed, epoch)).permutation(rows)


def cut(lengths: Sequence[int] | NDArray[np.int64], budget: int, workers: int = 1) -> Cut:
    """Cut rows of these lengths into micro-batches of at most `budget` tokens (a longer row has one of its own).

    Every worker gets the same number, because collectives meet at each of them; a worker short of rows gets an empty
    one. Cuts are as even as contiguous runs of the sorted rows allow, and dealt so that no worker gets all long ones.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    ordered = lengths[order]
    least = len(_runs(ordered, budget))
    wanted = math.ceil(max(least, 1) / workers) * workers
    runs = _runs(ordered, _even_budget(ordered, wanted, budget))
    while len(runs) < min(wanted, len(ordered)):
        runs = _halve_the_largest(ordered, runs)
    micro = [order[first:last] for first, last in runs]
    micro += [order[:0]] * (wanted - len(micro))
    return tuple(tuple(micro[worker::workers]) for worker in range(workers))


def _runs(ordered: Indices, budget: int) -> list[tuple[int, int]]:
    """Greedy contiguous runs whose tokens fit the budget."""
    runs: list[tuple[int, int]] = []
    first, tokens = 0, 0
    for i, length in enumerate(ordered.tolist()):
        if i > first and tokens + length > budget:
            runs.append((first, i))
            first, tokens = i, 0
        tokens += length
    return [*runs, (first, len(ordered))] if len(ordered) else []


def _even_budget(ordered: Indices, wanted: int, budget: int) -> int:
    """The smallest budget that still needs no more than `wanted` runs."""
    if not len(ordered):
        return budget
    low, high = min(math.ceil(int(ordered.sum()) / wanted), budget), budget
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_runs(ordered, middle)) <= wanted else (middle + 1, high)
    return low


def _halve_the_largest(ordered: Indices, runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    at = max((i for i, (a, b) in enumerate(runs) if b - a > 1), key=lambda i: int(ordered[slice(*runs[i])].sum()))
    first, last = runs[at]
    middle = (first + last) // 2
    return [*runs[:at], (first, middle), (middle, last), *runs[at + 1 :]]
