"""What pruning did to redundancy and to coverage (Sec. 2.2.1, Phase II: "eliminate redundancy").

Redundancy is how similar a prompt is to its nearest other prompt; coverage is how similar a prompt of the traffic is
to its nearest retained one. A uniform random subset of the same size stands beside, because any smaller set is less
redundant."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flywheel_tasks.curation.cluster import Quantised, Rows, gather, similarity

NEAR = 0.95


def sample(blocks: list[Rows], rows: int, seed: int) -> list[Rows]:
    """Whole blocks, drawn at random, until they hold `rows` rows."""
    order = np.random.default_rng(seed).permutation(len(blocks))
    sizes = np.cumsum([len(blocks[i]) for i in order])
    return [blocks[i] for i in order[: int(np.searchsorted(sizes, rows)) + 1]]


def nearest(
    vectors: Quantised, blocks: list[Rows], kept: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For each row of the blocks: cosine to its nearest kept row, and to its nearest *other* kept row; NaN where none
    is."""
    own, other = [], []
    for rows in blocks:
        block, stays = gather(vectors, rows), np.flatnonzero(kept[rows])
        products = np.full((len(rows), len(stays) + 1), -np.inf, dtype=np.float32)
        products[:, :-1] = block @ block[stays].T
        own.append(products.max(axis=1))
        products[stays, np.arange(len(stays))] = np.where(
            kept[rows][stays] > 1, products[stays, np.arange(len(stays))], -np.inf
        )
        other.append(products.max(axis=1))
    return _cosine(own), _cosine(other)


def _cosine(parts: list[NDArray[np.float32]]) -> NDArray[np.float64]:
    products = np.concatenate(parts).astype(np.float64)
    return np.where(np.isfinite(products), np.minimum(similarity(products), 1.0), np.nan)


def measure(
    vectors: Quantised, blocks: list[Rows], copies: NDArray[np.int64], kept: NDArray[np.int64], seed: int
) -> dict[str, Any]:
    """Redundancy before and after, and coverage beside that of a random subset of the same size, over the given
    blocks."""
    if not blocks:
        return {}
    rows = np.concatenate(blocks)
    rng = np.random.default_rng(seed)
    chosen = _random_subset(copies[rows], int(kept[rows].sum()), rng)
    at_random = np.zeros_like(kept)
    at_random[rows] = chosen
    _, before = nearest(vectors, blocks, copies)
    own, after = nearest(vectors, blocks, kept)
    random_own, random_after = nearest(vectors, blocks, at_random)
    return {
        "measured_rows": int(copies[rows].sum()),
        "redundancy": {
            "before": _redundancy(before, copies[rows]),
            "after": _redundancy(after, kept[rows]),
            "random_subset": _redundancy(random_after, chosen),
        },
        "coverage": {"after": _cover(own, copies[rows]), "random_subset": _cover(random_own, copies[rows])},
    }


def _random_subset(copies: NDArray[np.int64], size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    drawn = rng.permutation(np.repeat(np.arange(len(copies)), copies))[:size]
    return np.bincount(drawn, minlength=len(copies))


def _redundancy(cosine: NDArray[np.float64], weight: NDArray[np.int64]) -> dict[str, float | None]:
    known = np.isfinite(cosine) & (weight > 0)
    if not known.any():
        return {"mean_nearest_similarity": None, "share_with_a_near_duplicate": None}
    return {
        "mean_nearest_similarity": float(np.average(cosine[known], weights=weight[known])),
        "share_with_a_near_duplicate": float(np.average(cosine[known] >= NEAR, weights=weight[known])),
    }


def _cover(cosine: NDArray[np.float64], weight: NDArray[np.int64]) -> dict[str, float | None]:
    known = np.isfinite(cosine)
    if not known.any():
        return {"mean_similarity_to_kept": None, "least_similarity_to_kept": None, "share_in_an_empty_block": 1.0}
    return {
        "mean_similarity_to_kept": float(np.average(cosine[known], weights=weight[known])),
        "least_similarity_to_kept": float(cosine[known].min()),
        "share_in_an_empty_block": float(np.average(~known, weights=weight)),
    }
