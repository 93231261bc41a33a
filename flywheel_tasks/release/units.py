"""From unit ids to positions in an array: an exact, ordered hash table in numpy.

Ids are 64-bit integers or strings. Integers are mixed by a bijection, so two ids never share a hash; strings are
packed into 64-bit words, hashed, and every hit is compared word for word. The hashes lie in order without gaps; an
index by their leading bits says where to begin, and a probe that meets a larger hash knows that its id is absent.
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
_BLOCK = 1 << 16
"""Rows worked on at once, so that what lies between input and result stays in the cache and is never paged in."""


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
    if len(words) <= _BLOCK:
        return _hashed(words)
    out = np.empty(len(words), np.uint64)
    for at in range(0, len(words), _BLOCK):
        out[at : at + _BLOCK] = _hashed(words[at : at + _BLOCK])
    return out


def _hashed(words: Words) -> Words:
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
    """Known ids by the order of their hashes: a unit's position is its rank."""

    slots: int
    shift: np.uint64
    heads: Words
    """Per value of the leading bits, the first hash that begins with them: its other bits, and its rank below them."""
    ranked: Words
    """The hashes in order, then two that nothing exceeds."""
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
        bits = np.uint64(64) - self.shift
        rank = (np.uint64(1) << bits) - np.uint64(1)
        head = np.take(self.heads, (q >> self.shift).view(np.int64))
        at: NDArray[np.int64] = (head & rank).view(np.int64)
        head ^= q << bits
        miss = np.flatnonzero(head > rank)
        p, wanted = at[miss], q[miss]
        at[miss] = -1
        while len(miss):
            p += 1
            seen = np.take(self.ranked, p)
            hit = np.flatnonzero(seen == wanted)
            at[miss[hit]] = p[hit]
            on = np.flatnonzero(seen < wanted)
            miss, p, wanted = miss[on], p[on], wanted[on]
        if int(at.max(initial=-1)) >= self.slots:
            at[at >= self.slots] = -1
        if self.words is not None:
            known = np.flatnonzero(at >= 0)
            differs = (self.words[at[known]] != words[known]).any(axis=1)
            at[known[differs]] = -1
        return at


def in_order(h: Words, order: NDArray[np.int64]) -> Words:
    """Hashes by rank, and two beyond them that no probe passes."""
    out = np.empty(len(h) + 2, np.uint64)
    np.take(h, order, out=out[:-2], mode="clip")
    out[-2:] = np.iinfo(np.uint64).max
    return out


def build(words: Words, ranked: Words, order: NDArray[np.int64]) -> UnitTable:
    """The table of distinct ids, given their order and their hashes in it."""
    n, width = words.shape
    bits = max(4, (2 * max(n, 1) - 1).bit_length())
    shift = np.uint64(64 - bits)
    heads = np.full(1 << bits, n, np.uint64)
    # Of several entries written to one place the last stays, so they go in from the last to the first.
    for at in reversed(range(0, n, _BLOCK)):
        h = ranked[at : min(at + _BLOCK, n)]
        entry = h << np.uint64(bits)
        entry |= np.arange(at, at + len(h), dtype=np.uint64)
        heads[(h >> shift).view(np.int64)[::-1]] = entry[::-1]
    return UnitTable(n, shift, heads, ranked, words[order] if width > 1 else None, width)
