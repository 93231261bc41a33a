"""A linear classifier over hashed n-grams: the embedded default behind safety and romanised-Hindi detection (Sec. 2.6).

It reads the bytes of an Arrow string array: byte n-grams, words and pairs of words are hashed by one prefix sum, looked
up in a weight table and summed per row, without a Python object per text. The same features train it (fit.py).
"""

from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_BASE = np.uint32(16777619)
_INVERSE = np.uint32(pow(16777619, -1, 1 << 32))
_MIX = np.uint32(0x9E3779B1)
_WORD, _PAIR = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)
# The scratch arrays of a chunk this size stay in a core's cache: four times the speed of a megabyte.
_CHUNK = 1 << 15
_SPACE = 32


class _Chunk(NamedTuple):
    data: npt.NDArray[np.uint8]
    starts: IntArray
    ends: IntArray
    first_row: int


class Features(NamedTuple):
    """Hashed features of some texts: for every occurrence its row and its column."""

    rows: IntArray
    columns: IntArray


class LinearModel(NamedTuple):
    """Weights over hashed features; `logit = bias + sum(weights[columns]) / sqrt(number of features)`."""

    weights: npt.NDArray[np.float32]
    bias: float
    orders: tuple[int, ...]
    words: bool
    window: int
    threshold: float


def features(texts: pa.StringArray, bits: int, orders: tuple[int, ...], words: bool) -> Features:
    """Columns in [0, 2**bits) of the n-grams of every text, lower-cased, with its ends marked by a space."""
    rows, columns = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for chunk in _chunks(texts):
        row_of = chunk.first_row + np.repeat(np.arange(len(chunk.starts)), chunk.ends - chunk.starts)
        for begin, column, foreign in _hashed(chunk, bits, orders, words):
            rows.append(np.delete(row_of[begin], foreign))
            columns.append(np.delete(column, foreign).astype(np.int64))
    return Features(np.concatenate(rows), np.concatenate(columns))


def probabilities(model: LinearModel, texts: pa.StringArray) -> FloatArray:
    """Probability of the positive class; a text longer than the window scores as its worst window does."""
    bits = len(model.weights).bit_length() - 1
    result = np.zeros(len(texts))
    for part, owner in _windows(texts, model.window):
        total, count = np.zeros(len(part)), np.zeros(len(part))
        for chunk in _chunks(part):
            here = slice(chunk.first_row, chunk.first_row + len(chunk.starts))
            gathered = np.zeros((2, len(chunk.data)), np.float32)
            for begin, column, foreign in _hashed(chunk, bits, model.orders, model.words):
                found = np.stack((model.weights[column], np.ones(len(column), np.float32)))
                found[:, foreign] = 0
                gathered[:, begin] += found
            total[here], count[here] = np.add.reduceat(gathered, chunk.starts, axis=1)
        logit = model.bias + total / np.sqrt(np.maximum(count, 1))
        np.maximum.at(result, owner, 1 / (1 + np.exp(-np.clip(logit, -50, 50))))
    return result


def load(name_or_path: str) -> LinearModel:
    """Weights shipped with the package (a bare name) or a safetensors file of one's own, written by fit.py."""
    from safetensors import safe_open

    path = Path(name_or_path)
    if not path.suffix:
        path = Path(str(resources.files("flywheel_tasks.curation") / "weights" / f"{name_or_path}.safetensors"))
    with safe_open(path, framework="numpy") as file:
        meta: dict[str, Any] = file.metadata() or {}
        packed = file.get_tensor("weights")
    weights = packed.astype(np.float32) * float(meta["scale"])
    orders = tuple(int(order) for order in meta["orders"].split(","))
    return LinearModel(
        weights, float(meta["bias"]), orders, meta["words"] == "1", int(meta["window"]), float(meta["threshold"])
    )


def save(model: LinearModel, path: Path) -> LinearModel:
    """Store the weights in 8 bits, and return the model as it will be read back."""
    from safetensors.numpy import save_file

    scale = float(np.abs(model.weights).max()) / 127 or 1.0
    packed = np.round(model.weights / scale).astype(np.int8)
    meta = {
        "scale": repr(scale), "bias": repr(model.bias), "orders": ",".join(map(str, model.orders)),
        "words": str(int(model.words)), "window": str(model.window), "threshold": repr(model.threshold),
    }  # fmt: skip
    save_file({"weights": packed}, path, meta)
    return load(str(path))


def _chunks(texts: pa.StringArray) -> Iterator[_Chunk]:
    """Runs of whole rows of about `_CHUNK` bytes."""
    padded = pc.binary_join_element_wise("", pc.utf8_lower(texts), "", " ")
    if not len(padded):
        return
    width = np.int64 if pa.types.is_large_string(padded.type) else np.int32
    offsets = np.frombuffer(padded.buffers()[1], width)[padded.offset : padded.offset + len(padded) + 1].astype(
        np.int64
    )
    data = np.frombuffer(padded.buffers()[2], np.uint8)
    first = 0
    while first < len(padded):
        last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + _CHUNK, side="right")) - 1)
        low, high = offsets[first], offsets[last]
        chunk = data[low:high]
        chunk = np.where((chunk == 9) | (chunk == 10) | (chunk == 13), np.uint8(_SPACE), chunk)
        yield _Chunk(chunk, offsets[first:last] - low, offsets[first + 1 : last + 1] - low, first)
        first = last


def _hashed(
    chunk: _Chunk, bits: int, orders: tuple[int, ...], words: bool
) -> Iterator[tuple[slice | IntArray, npt.NDArray[np.uint32], IntArray]]:
    """Per kind of feature: where each begins, its column, and which of them run over the end of their row."""
    shift = np.uint32(32 - bits)
    codes = chunk.data.astype(np.uint32)
    rolling = codes
    for order in range(2, max(orders, default=0) + 1):
        rolling = rolling[:-1] * _BASE + codes[order - 1 :]
        if order in orders and len(rolling):
            foreign = (chunk.ends[:, None] - np.arange(1, order)).ravel()
            foreign = foreign[(foreign >= 0) & (foreign < len(rolling))]
            yield slice(0, len(rolling)), (rolling * _MIX) >> shift, foreign
    if not words:
        return
    first, last = _word_bounds(chunk.data)
    word = _word_hashes(codes, first, last)
    yield first, (word * _MIX) >> shift, np.empty(0, np.int64)
    row = np.searchsorted(chunk.ends, first, side="right")
    pair = (word[:-1] * _PAIR) ^ word[1:]
    yield first[:-1], (pair * _MIX) >> shift, np.flatnonzero(row[:-1] != row[1:])


def _word_hashes(codes: npt.NDArray[np.uint32], first: IntArray, last: IntArray) -> npt.NDArray[np.uint32]:
    """A polynomial in the bytes of each word, the same wherever the word stands."""
    powers = np.cumprod(np.full(len(codes), _BASE), dtype=np.uint32)
    inverse = np.cumprod(np.full(len(codes), _INVERSE), dtype=np.uint32)
    prefix = np.zeros(len(codes) + 1, np.uint32)
    np.cumsum((codes + np.uint32(1)) * powers, dtype=np.uint32, out=prefix[1:])
    return (prefix[last] - prefix[first]) * inverse[first] ^ _WORD


def _word_bounds(data: npt.NDArray[np.uint8]) -> tuple[IntArray, IntArray]:
    """Starts and ends of runs of letters, digits, apostrophes and non-ASCII bytes."""
    lower = data | np.uint8(32)
    inside = ((lower >= 97) & (lower <= 122)) | ((data >= 48) & (data <= 57)) | (data == 39) | (data >= 128)
    edges = np.diff(inside.astype(np.int8), prepend=np.int8(0), append=np.int8(0))
    return np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)


def _windows(texts: pa.StringArray, window: int) -> Iterator[tuple[pa.StringArray, IntArray]]:
    """The texts themselves, then overlapping windows of those that are longer than one."""
    lengths = pc.utf8_length(texts).to_numpy(zero_copy_only=False)
    short = np.flatnonzero(lengths <= window)
    if len(short):
        yield (texts if len(short) == len(texts) else texts.take(pa.array(short))), short
    for row in np.flatnonzero(lengths > window):
        text = texts[int(row)].as_py()
        pieces = [text[start : start + window] for start in range(0, len(text) - window // 2, window // 2)]
        yield pa.array(pieces), np.full(len(pieces), row)
