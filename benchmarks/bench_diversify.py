"""Diversify (Sec. 2.2.1, Phase II): blocks of bounded size against what public semantic deduplication does.

The peer is the method of SemDeDup (Abbas et al. 2023) and NeMo Curator's semantic stage: k-means, then for every
cluster the whole matrix of pairwise similarities, and a row's score is its largest similarity to an earlier row of
its cluster. NeMo Curator itself needs a GPU for it (cuDF, cuML); here scikit-learn's MiniBatchKMeans and numpy do the
same on the same cores.

Vectors are heavy-tailed as chat is: one tight blob holds 40 % of the rows. 384 dimensions, half of the rows are kept.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import resource
import tempfile
import threading
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Contender, Report, compare

WIDTH, KEEP, SEED = 384, 0.5, 0
PEER_CLUSTER_ROWS = 1000
PEER_MEMORY_GIB = 8


def _part(start: int, rows: int, centres: NDArray[np.float32]) -> NDArray[np.float32]:
    rng = np.random.default_rng((SEED, start))
    weights = 1 / np.arange(1, len(centres))
    label = np.where(rng.random(rows) < 0.4, 0, 1 + rng.choice(len(centres) - 1, size=rows, p=weights / weights.sum()))
    noise = rng.normal(size=(rows, WIDTH)).astype(np.float32) * rng.choice([0.005, 0.02, 0.04], size=(rows, 1)).astype(
        np.float32
    )
    vectors = centres[label] + noise
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


@functools.cache
def _file(rows: int) -> Path:
    """Unit vectors as float32 on disk, so that what is measured is the method and not the generator."""
    path = Path(tempfile.gettempdir()) / f"bench-diversify-{os.getuid()}-{rows}.f32"
    centres = np.random.default_rng(SEED).normal(size=(2000, WIDTH)).astype(np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    with path.open("wb") as stream:
        for start in range(0, rows, 50_000):
            stream.write(_part(start, min(50_000, rows - start), centres).tobytes())
    return path


def _load(path: str, rows: int) -> NDArray[np.float32]:
    return np.memmap(path, np.float32, "r", shape=(rows, WIDTH))


def ours(path: str, rows: int) -> dict[str, Any]:
    from flywheel_tasks.curation.cluster import quantise, similarity
    from flywheel_tasks.curation.prune import keep, redundancies

    source = _load(path, rows)
    with tempfile.NamedTemporaryFile() as file, Anonymous() as memory:
        vectors = np.memmap(file.name, np.int16, "w+", shape=(rows, WIDTH))  # the stage keeps them in such a file
        for at in range(0, rows, 50_000):
            vectors[at : at + 50_000] = quantise(source[at : at + 50_000])[0]
        order = np.random.default_rng(SEED).permutation(rows)
        found = redundancies(vectors, order, 1024, SEED)
        kept = keep(found.redundancy, order, np.ones(rows, dtype=np.int64), KEEP) > 0
    cut = found.redundancy[kept & np.isfinite(found.redundancy)].max()
    largest = max(map(len, found.blocks))
    return _quality(source, kept) | {
        "cut": float(similarity(cut)), "largest_block": largest, "anonymous_mib": memory.peak_mib
    }  # fmt: skip


class Anonymous:
    """Peak of the memory that is no file's: mapped pages of a file go back to the system when it needs them."""

    def __enter__(self) -> Self:
        self.peak_mib, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            text = Path("/proc/self/smaps_rollup").read_text()
            kib = next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Anonymous:"))
            self.peak_mib = max(self.peak_mib, kib // 1024)


def peer(path: str, rows: int) -> dict[str, Any]:
    from sklearn.cluster import MiniBatchKMeans

    limit = PEER_MEMORY_GIB << 30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    source = np.array(_load(path, rows))
    try:
        clusters = max(1, rows // PEER_CLUSTER_ROWS)
        label = MiniBatchKMeans(clusters, random_state=SEED, batch_size=4096, n_init=1).fit_predict(source)
        score = np.full(rows, -1.0, dtype=np.float32)
        largest = 0
        for cluster in range(clusters):
            members = np.flatnonzero(label == cluster)
            largest = max(largest, len(members))
            if len(members) > 1:
                similar = source[members] @ source[members].T
                score[members[1:]] = np.triu(similar, 1).max(axis=0)[1:]
    except MemoryError:
        return {"failed": f"out of memory at {PEER_MEMORY_GIB} GiB"}
    kept = np.zeros(rows, dtype=bool)
    kept[np.argsort(score, kind="stable")[: round(KEEP * rows)]] = True
    return _quality(source, kept) | {"largest_block": largest}


def _quality(source: NDArray[np.float32], kept: NDArray[np.bool_]) -> dict[str, Any]:
    """How well a sample of all rows is covered by the rows that stay, by exhaustive search."""
    rng = np.random.default_rng(SEED)
    probe = source[np.sort(rng.choice(len(source), min(2000, len(source)), replace=False))]
    best = np.full(len(probe), -1.0, dtype=np.float32)
    stays = np.flatnonzero(kept)
    for at in range(0, len(stays), 20_000):
        best = np.maximum(best, (probe @ source[stays[at : at + 20_000]].T).max(axis=1))
    return {
        "kept": int(kept.sum()),
        "cover_mean": round(float(best.mean()), 5),
        "cover_least": round(float(best.min()), 5),
    }


def main(*, quick: bool = False) -> list[Report]:
    sizes = (3_000, 10_000) if quick else (10_000, 100_000, 1_000_000)
    reports = []
    for rows in sizes:
        path = str(_file(rows))
        contenders = [
            Contender(
                "flywheel: bounded blocks", "benchmarks.bench_diversify:ours", {"path": path, "rows": rows}, work=rows
            )
        ]
        if rows <= 100_000:
            contenders.append(
                Contender(
                    "MiniBatchKMeans + full pairwise",
                    "benchmarks.bench_diversify:peer",
                    {"path": path, "rows": rows},
                    work=rows,
                )
            )
        report = compare(
            f"diversify_{rows}", f"diversify {rows:,} x {WIDTH}, keep {KEEP:.0%}", contenders,
            repeats=3 if rows <= 100_000 else 1, notes=[f"the peer may use {PEER_MEMORY_GIB} GiB"],
        )  # fmt: skip
        report.notes.extend(f"{row.name}: {row.result}" for row in report.rows)
        reports.append(report)
        Path(path).unlink()
    for before, after in itertools.pairwise(reports):
        ratio = int(after.name.split("_")[1]) / int(before.name.split("_")[1])
        for a in before.rows:
            for b in after.rows:
                if a.name == b.name and "failed" not in b.result:
                    after.notes.append(
                        f"{a.name}: time grows as rows^{math.log(b.wall_s / a.wall_s) / math.log(ratio):.2f}"
                    )
    return reports
