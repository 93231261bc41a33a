"""Pruning prompts close in embedding space, retaining a proportion p exactly (Sec. 2.2.1, Phase II).

Inside each block rows are put in farthest-first order: each next row is the one least similar to those already taken,
and its *redundancy* is that similarity to the nearest earlier row. Redundancy never falls along the order, so
keeping, over all blocks, the rows of lowest redundancy keeps a prefix of every block. One number r, the redundancy at
which the cut falls, then holds on both sides (Gonzalez 1985):

- spread: two kept rows of one block are at most r similar;
- cover: every removed row is at least r similar to a kept row of its block (as long as p leaves one row a block).

A threshold on nearest-neighbour similarity gives neither (a chain of near-duplicates can all fall to one another),
and its retained proportion is whatever it turns out to be. The cost is rows x cap products, the memory cap x cap."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flywheel_tasks.curation.cluster import Quantised, Rows, gather, partition

_FIRST = -np.inf
"""Redundancy of the first row of a block: nothing came before it."""


@dataclass(frozen=True)
class Farthest:
    """Per row: redundancy, the earlier row it is closest to (itself for a block's first), its cluster and its block."""

    redundancy: NDArray[np.float32]
    nearest: Rows
    cluster: NDArray[np.int32]
    blocks: list[Rows]


def farthest_first(block: NDArray[np.float32]) -> tuple[NDArray[np.float32], Rows]:
    """Redundancy (as a product of quantised rows) and nearest earlier row of each row of one block, row 0 first."""
    products = block @ block.T
    closest = products[0].copy()
    origin = np.zeros(len(block), dtype=np.int64)
    redundancy = np.full(len(block), _FIRST, dtype=np.float32)
    nearest = np.zeros(len(block), dtype=np.int64)
    closest[0] = np.inf
    for _ in range(len(block) - 1):
        row = closest.argmin()
        redundancy[row], nearest[row] = closest[row], origin[row]
        nearer = products[row] > closest
        np.copyto(closest, products[row], where=nearer)
        np.copyto(origin, row, where=nearer)
        closest[row] = np.inf
    return redundancy, nearest


def redundancies(vectors: Quantised, order: Rows, cap: int, seed: int) -> Farthest:
    """Farthest-first redundancy of every row of `order` within its block of at most `cap` rows."""
    redundancy = np.full(len(vectors), np.inf, dtype=np.float32)
    nearest = np.arange(len(vectors), dtype=np.int64)
    clusters = np.full(len(vectors), -1, dtype=np.int32)
    blocks = []
    for cluster, rows in partition(vectors, order, cap, seed):
        redundancy[rows], local = farthest_first(gather(vectors, rows))
        nearest[rows] = rows[local]
        clusters[rows] = cluster
        blocks.append(rows)
    return Farthest(redundancy, nearest, clusters, blocks)


def keep(
    redundancy: NDArray[np.float32], order: Rows, copies: NDArray[np.int64], proportion: float
) -> NDArray[np.int64]:
    """How many copies of each distinct row stay: round(proportion x all copies), at least one, the least redundant
    first.

    Copies beyond the first repeat a kept row outright, so they go before anything else does. `order` settles ties.
    """
    wanted = max(min(1, len(order)), round(proportion * int(copies[order].sum())))
    kept = np.zeros(len(copies), dtype=np.int64)
    kept[order[np.argsort(redundancy[order], kind="stable")[:wanted]]] = 1
    spare = wanted - int(kept.sum())
    if spare > 0:
        # Whole numbers in proportion to the further copies; rounding the running total meets the sum exactly.
        running = np.cumsum(copies[order] - 1)
        kept[order] += np.diff(running * spare // running[-1], prepend=0)
    return kept
