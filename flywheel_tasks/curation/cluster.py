"""Bounded blocks of close prompts: k-means on normalised embeddings (Sec. 2.2.1, Phase II).

Chat traffic is heavy-tailed: one k-means cell can hold half of all rows, and pairwise work inside it then needs
memory quadratic in the traffic. Here a cell above `cap` rows is clustered again, so that every block handed on is
small whatever the shape of the data, and the work (rows x fan-out x depth) is linear in rows.

Vectors are kept as whole numbers (`quantise`). By Cauchy-Schwarz every partial sum of a product of two of them stays
below 2**24, so float32 matrix products are exact: no thread count, BLAS or block size can change an assignment or a
similarity."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

SCALE = 4000
_MAX_FANOUT = 256
_SAMPLE_PER_CENTROID = 64
_CHUNK = 16_384

Quantised = NDArray[np.int16]
Rows = NDArray[np.int64]


def quantise(vectors: NDArray[np.floating]) -> tuple[Quantised, NDArray[np.bool_]]:
    """Unit-length rows as int16, and which rows have a direction at all (NaN, infinite and zero rows have none)."""
    wide = np.asarray(vectors, dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.linalg.norm(wide, axis=1)
    valid = np.isfinite(norms) & (norms > 0)
    unit = np.divide(wide, norms[:, None], out=np.zeros_like(wide), where=valid[:, None])
    return np.rint(unit * SCALE).astype(np.int16), valid


def similarity(dots: NDArray[np.floating]) -> NDArray[np.floating]:
    """Cosine of two quantised rows from their product."""
    return dots / float(SCALE * SCALE)


def gather(vectors: Quantised, rows: Rows) -> NDArray[np.float32]:
    return vectors[rows].astype(np.float32)


def fit(sample: NDArray[np.float32], k: int, seed: int, iterations: int = 10) -> NDArray[np.float32]:
    """k unit centroids of a sample of quantised rows, quantised too."""
    import faiss
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped,unused-ignore]

    # Sums of centroids are not whole numbers, so training alone runs on one thread; the sample is small.
    with threadpool_limits(1):
        kmeans = faiss.Kmeans(
            sample.shape[1], k, niter=iterations, spherical=True, seed=seed & 0x7FFFFFFF,
            min_points_per_centroid=1, max_points_per_centroid=_SAMPLE_PER_CENTROID,
        )  # fmt: skip
        kmeans.train(np.ascontiguousarray(sample / SCALE))
    return quantise(np.asarray(kmeans.centroids))[0].astype(np.float32)


def assign(vectors: Quantised, rows: Rows, centroids: NDArray[np.float32]) -> NDArray[np.int64]:
    """Nearest centroid of each row, the first one on a tie."""
    label = np.empty(len(rows), dtype=np.int64)
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        label[part] = (gather(vectors, rows[part]) @ centroids.T).argmax(axis=1)
    return label


def _groups(rows: Rows, label: NDArray[np.int64], k: int) -> list[Rows]:
    order = np.argsort(label, kind="stable")
    return [group for group in np.split(rows[order], np.searchsorted(label[order], np.arange(1, k))) if len(group)]


def _split(vectors: Quantised, rows: Rows, cap: int, seed: int) -> list[Rows]:
    k = min(_MAX_FANOUT, -(-2 * len(rows) // cap))
    sample = gather(vectors, rows[: k * _SAMPLE_PER_CENTROID])
    groups = _groups(rows, assign(vectors, rows, fit(sample, k, seed)), k)
    if max(map(len, groups)) <= max(cap, 0.9 * len(rows)):
        return groups
    # k-means makes no headway on rows that (nearly) coincide; a cut across a random direction keeps near ones together.
    direction = np.random.default_rng(seed).integers(-SCALE, SCALE, vectors.shape[1]).astype(np.float64)
    along = np.concatenate([vectors[rows[at : at + _CHUNK]] @ direction for at in range(0, len(rows), _CHUNK)])
    rank = np.argsort(np.argsort(along, kind="stable"))
    return _groups(rows, rank // cap, -(-len(rows) // cap))


def partition(vectors: Quantised, order: Rows, cap: int, seed: int) -> Iterator[tuple[int, Rows]]:
    """(cluster, rows) of every block: at most `cap` rows each, in `order`; every row of `order` is in exactly one
    block.

    `cluster` numbers the cells of the first split, the ones a report shows. `order` is a seeded one: centroids are
    fitted on its first rows, and a block's first row is the one that is always kept. Given the rows and their order,
    nothing else (how they were filed, how many threads there are) changes the blocks."""
    if len(order) == 0:
        return
    top = [order] if len(order) <= cap else _split(vectors, order, cap, seed)
    for cluster, cell in enumerate(top):
        pending = [cell]
        while pending:
            rows = pending.pop()
            if len(rows) <= cap:
                yield cluster, rows
            else:
                pending += _split(vectors, rows, cap, seed)[::-1]
