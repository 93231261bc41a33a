"""From unit ids to positions in an array: an exact, ordered hash table in numpy.

Ids are 64-bit integers or strings. Integers are mixed by a bijection, so two ids never share a hash; strings are
packed into 64-bit words, hashed, and every hit is compared word for word. Keys lie in the table in hash order with
linear probing, so the table is built by one sort and one running maximum, and a probe that meets a larger hash knows
that its id is absent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from flywheel_tasks.core.errors import InputError

T = TypeVar("T", bound=np.generic)
Words = NDArray[np.uint64]

_ODD = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93))
_LONGEST_ID = 256


def id_words(ids: pa.Array | pa.ChunkedArray, width: int | None = None) -> Words:
    """Unit ids as rows of 64-bit words: one word for integers, the padded bytes and their length for strings.

    `width` pads strings to a known number of words. A longer string gets a row that equals no padded one.
    """
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
        ids = pa.concat_arrays(ids.chunks) if isinstance(ids, pa.ChunkedArray) else ids
    if pa.types.is_dictionary(ids.type):
        return id_words(ids.dictionary, width)[values(ids.indices.cast(pa.int64()), np.int64)]
    if pa.types.is_integer(ids.type):
        return values(ids if pa.types.is_uint64(ids.type) else ids.cast(pa.int64()), np.uint64).reshape(-1, 1)
    if not (pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type)):
        raise InputError(f"unit_id has type {ids.type}: give strings or integers")
    return _string_words(ids.cast(pa.large_string()), width)


def values(array: pa.Array, dtype: type[T]) -> NDArray[T]:
    """A fixed-width Arrow array without nulls as numpy, without a copy and without importing pandas."""
    if array.null_count:
        raise InputError(f"{array.null_count} nulls where every row needs a value")
    data = array.buffers()[1]
    whole: NDArray[T] = np.empty(0, dtype) if data is None else np.frombuffer(data, dtype)
    return whole[array.offset : array.offset + len(array)]


def _string_words(ids: pa.LargeStringArray, width: int | None) -> Words:
    n = len(ids)
    offsets = np.frombuffer(ids.buffers()[1], np.int64)[ids.offset : ids.offset + n + 1]
    sizes = np.diff(offsets)
    longest = int(sizes.max(initial=0))
    if longest > _LONGEST_ID:
        raise InputError(f"a unit_id is {longest} bytes long: the limit is {_LONGEST_ID}")
    words = max(1, -(-longest // 8)) if width is None else width - 1
    out = np.zeros((n, words + 1), np.uint64)
    out[:, -1] = sizes
    if n == 0 or longest == 0:
        return out
    text = np.frombuffer(ids.buffers()[2], np.uint8)
    room = words * 8
    padded = out.view(np.uint8)[:, :room]
    if int(sizes.min()) == longest <= room:
        padded[:, :longest] = text[offsets[0] : offsets[-1]].reshape(n, longest)
        return out
    kept = np.minimum(sizes, room)
    row = np.repeat(np.arange(n), kept)
    column = np.arange(len(row)) - np.repeat(np.cumsum(kept) - kept, kept)
    padded[row, column] = text[np.repeat(offsets[:-1], kept) + column]
    return out


def hashed(words: Words) -> Words:
    """A 64-bit hash of each row; for one word it is a bijection."""
    h: Words = words[:, 0] * _ODD[0]
    h ^= h >> np.uint64(32)
    h *= _ODD[1]
    for j in range(1, words.shape[1]):
        h = (h ^ words[:, j]) * _ODD[0]
        h ^= h >> np.uint64(29)
        h *= _ODD[1]
    h ^= h >> np.uint64(32)
    return h


@dataclass(frozen=True, slots=True)
class UnitTable:
    """Positions of known ids. `slots` says how many positions there are; not every one is taken."""

    slots: int
    shift: np.uint64
    last: int
    table: Words
    words: Words | None
    width: int

    def read(self, ids: pa.Array) -> Words:
        """Ids as words of the table's own width."""
        words = id_words(ids, self.width if self.words is not None else None)
        if words.shape[1] != self.width:
            raise InputError("unit_id is a string in one input and an integer in the other: give both the same type")
        return words

    def find(self, q: Words, words: Words) -> NDArray[np.int64]:
        """The position of each id by its hash, -1 where the id is unknown."""
        at: NDArray[np.int64] = (q >> self.shift).view(np.int64)
        miss = np.flatnonzero(np.take(self.table, at) != q)
        p, wanted = at[miss] + 1, q[miss]
        at[miss] = -1
        while len(miss):
            seen = np.take(self.table, p)
            hit = (seen == wanted) & (p <= self.last)
            at[miss[hit]] = p[hit]
            on = seen < wanted
            miss, p, wanted = miss[on], p[on] + 1, wanted[on]
        if self.words is not None:
            known = np.flatnonzero(at >= 0)
            differs = (self.words[at[known]] != words[known]).any(axis=1)
            at[known[differs]] = -1
        return at


def build(words: Words, h: Words, order: NDArray[np.int64]) -> tuple[UnitTable, NDArray[np.int64]]:
    """The table of distinct ids, and their positions in the order of their hashes."""
    n, width = words.shape
    bits = max(4, (2 * max(n, 1) - 1).bit_length())
    shift = np.uint64(64 - bits)
    ranked = h[order]
    rank = np.arange(n)
    slot = (ranked >> shift).view(np.int64) - rank
    np.maximum.accumulate(slot, out=slot)
    slot += rank
    last = int(slot[-1]) if n else -1
    slots = max(1 << bits, last + 1)
    # An empty slot holds the smallest hash of the next one: larger than any hash that can probe it, equal to none.
    table = np.arange(1, slots + 2, dtype=np.uint64)
    table <<= shift
    table[1 << bits :] = np.iinfo(np.uint64).max
    table[slot] = ranked
    exact = None
    if width > 1:
        exact = np.zeros((slots, width), np.uint64)
        exact[slot] = words[order]
    return UnitTable(slots, shift, last, table, exact, width), slot
