"""Prompts as cells: the values of each dimension of Table 1, their targets, and a proportional sample under the
caps."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.curation.apportion import Cells, Floats, Ints

UNKNOWN = "unknown"
ORIGINAL = "original"


@dataclass(frozen=True)
class Dimension:
    """One dimension: its values, each row's value, and the target share of every value (which may have no row)."""

    name: str
    values: tuple[str, ...]
    codes: Ints
    target: Floats
    source: str

    def shares(self, rows: NDArray[np.bool_] | None = None) -> Floats:
        counted = np.bincount(self.codes if rows is None else self.codes[rows], minlength=len(self.values))
        return counted / max(1, counted.sum())

    def distance(self, shares: Floats) -> float:
        """Total-variation distance to the target."""
        return float(np.abs(shares - self.target).sum() / 2)


def labels(column: pa.ChunkedArray, buckets: int) -> pa.ChunkedArray:
    """Values as text; a score falls into one of `buckets` quantile buckets q1 (lowest) … ; null is 'unknown'."""
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_finite(column), column, None)
        scores = column.drop_null().to_numpy()
        edges = np.quantile(scores, np.arange(1, buckets) / buckets) if len(scores) else np.zeros(0)
        place = np.searchsorted(edges, column.fill_null(0.0).to_numpy(), side="right")
        named = pa.array([f"q{i + 1}" for i in range(buckets)]).take(pa.array(place))
        column = pc.if_else(column.is_valid(), named, None)
    return pc.fill_null(column.cast(pa.string()), UNKNOWN)


def dimension(
    name: str, column: pa.ChunkedArray, traffic: Mapping[str, int] | None, wanted: str | Mapping[str, float]
) -> Dimension:
    """Encode a column of labels and settle its target: the traffic's own distribution, or the one that is asked for."""
    encoded = column.combine_chunks().dictionary_encode()
    present = encoded.dictionary.to_pylist()
    candidates = dict(
        zip(present, np.bincount(encoded.indices.to_numpy(), minlength=len(present)).tolist(), strict=True)
    )
    original = traffic if traffic and sum(traffic.values()) else candidates
    asked = {} if isinstance(wanted, str) else dict(wanted)
    values = tuple(sorted({*present, *original, *asked}))
    place = {value: index for index, value in enumerate(values)}
    codes = np.array([place[value] for value in present], dtype=np.int64)[encoded.indices.to_numpy()]
    weight = np.array([0.0 if value in asked else float(original.get(value, 0)) for value in values])
    rest = 1.0 - sum(asked.values())
    if asked and rest > 1e-9 and not weight.sum():
        raise InputError(
            f"constrain.targets.{name}: the shares add up to {1 - rest:.4g} and no other value is there for the rest; "
            "make them add up to 1"
        )
    target = np.array([asked.get(value, 0.0) for value in values])
    if weight.sum():
        target = target + max(0.0, rest) * weight / weight.sum()
    return Dimension(name, values, codes, target / target.sum(), "preset" if asked else ORIGINAL)


def group(dimensions: list[Dimension], first: NDArray[np.bool_], character: Ints, capped: Ints) -> tuple[Cells, Ints]:
    """Cells of rows that are alike for the program, and each row's cell. `capped` characters are kept apart."""
    apart = np.full(int(character.max(initial=-1)) + 1, len(capped), dtype=np.int64)
    apart[capped] = np.arange(len(capped))
    keys = [apart[character], first.astype(np.int64), *(d.codes for d in dimensions)]
    code = np.zeros(len(first), dtype=np.int64)
    for key in keys:
        # Re-numbering after each key keeps the code below rows x values, so it can't overflow.
        _, code = np.unique(code * (int(key.max(initial=0)) + 1) + key, return_inverse=True)
    cell = code.astype(np.int64)
    rows = np.bincount(cell)
    example = np.empty(len(rows), dtype=np.int64)
    example[cell] = np.arange(len(cell))
    values = (
        np.stack([d.codes[example] for d in dimensions], axis=1)
        if dimensions
        else np.zeros((len(rows), 0), dtype=np.int64)
    )
    return Cells(rows, first[example], keys[0][example], values, len(capped)), cell


def proportional(cells: Cells, characters: Ints, capped: Ints, cap_rows: int, size: int) -> Ints:
    """The same share of every cell, but no more of a character than its cap: the sample that disturbs nothing else."""
    low, high = 0.0, 1.0
    for _ in range(60):
        share = (low + high) / 2
        low, high = (share, high) if np.minimum(share * characters, cap_rows).sum() < size else (low, share)
    share_of = np.append(np.minimum(high, cap_rows / characters[capped]), high)
    return np.rint(share_of[cells.group] * cells.rows).astype(np.int64)
