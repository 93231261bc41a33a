"""Units to buckets by the leading bits of their hash, once: what one machine can't hold is read bucket by bucket.

Every input is read once and written again in pieces of a few million rows, one row group for each bucket, so a bucket
reads its own row groups and nothing else. Rows that no bucket can use are left out here, and counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.storage import Storage
from flywheel_tasks.release.parts import Part, need
from flywheel_tasks.release.scan import BadRows, check_types, good_rows, in_window
from flywheel_tasks.release.units import hashed, id_words
from flywheel_tasks.release.window import Window

PIECE_ROWS = 1 << 22
ACTIVITY = ("unit_id", "day", "sends")
Buckets = list[tuple[Part, ...]]


@dataclass(frozen=True)
class Share:
    """One input file and where its rows go; small enough to travel to a worker."""

    part: Part
    columns: tuple[str, ...]
    bits: int
    width: int
    store: str
    name: str
    experiment: str | None = None
    window: Window | None = None
    bad_rows: BadRows = "refuse"


def split(share: Share) -> str:
    """Write one file's rows by bucket; returns [[path, {bucket: row group}], ...] and the rows left out, as JSON."""
    file = share.part.open()
    need(file.schema_arrow, share.columns, share.part.path)
    if share.window:
        check_types(file.schema_arrow, share.part.path)
    rows, ready = Counter[str](), 0
    pieces: list[tuple[str, dict[int, int]]] = []
    held: list[pa.RecordBatch] = []
    for batch in file.iter_batches(1 << 18, columns=list(share.columns), use_threads=False):
        batch = _usable(batch, share, rows)
        held.append(batch)
        ready += batch.num_rows
        if ready >= PIECE_ROWS:
            pieces.append(_write(held, share, len(pieces)))
            held, ready = [], 0
    if ready:
        pieces.append(_write(held, share, len(pieces)))
    return json.dumps([pieces, rows])


def _usable(batch: pa.RecordBatch, share: Share, rows: Counter[str]) -> pa.RecordBatch:
    window = share.window
    if window is None:
        nulls = batch.column("unit_id").null_count
        if nulls:
            raise InputError(f"{share.part.path}: column 'unit_id' has {nulls} nulls; fill or drop them")
        return batch.filter(pc.equal(batch.column("experiment").cast(pa.string()), share.experiment))
    given = batch.num_rows
    kept = good_rows(in_window(batch, window, rows), share.bad_rows, rows, share.part.path)
    rows["activity rows"] += given - kept.num_rows
    return kept


def _write(held: Sequence[pa.RecordBatch], share: Share, number: int) -> tuple[str, dict[int, int]]:
    table = pa.Table.from_batches(held)
    bucket = hashed(id_words(table.column("unit_id"), share.width)) >> np.uint64(64 - share.bits)
    order = np.argsort(bucket.astype(np.uint16), kind="stable")
    sizes = np.bincount(bucket.view(np.int64), minlength=1 << share.bits)
    table = table.take(pa.array(order))
    path, at = f"{share.name}-{number:05d}.parquet", 0
    groups: dict[int, int] = {}
    with Storage(share.store).create(path) as stream, pq.ParquetWriter(stream, table.schema) as writer:
        for k, size in enumerate(sizes.tolist()):
            if size:
                groups[k] = len(groups)
                writer.write_table(table.slice(at, size), row_group_size=size)
                at += size
    return path, groups


def gather(found: Sequence[str], store: str, bits: int) -> tuple[Buckets, Counter[str]]:
    """What each bucket reads, and the rows that were left out."""
    buckets: list[list[Part]] = [[] for _ in range(1 << bits)]
    rows = Counter[str]()
    for text in found:
        pieces, left_out = json.loads(text)
        rows.update(left_out)
        for path, groups in pieces:
            for bucket, group in groups.items():
                buckets[int(bucket)].append(Part(path, store, group))
    return [tuple(parts) for parts in buckets], rows


def shares(parts: Sequence[Part], name: str, columns: Sequence[str], store: str, **more: Any) -> list[Share]:
    return [Share(part, tuple(columns), store=store, name=f"{name}-{i:05d}", **more) for i, part in enumerate(parts)]
