"""A table of prompts as distinct texts and their vectors (Sec. 2.2.1, Phase II).

The same words come again and again in chat ("hi" alone is a large share), so a text is embedded once per block and
kept once. Blocks are row groups of the stored table: workers read them by themselves, and only digests and vectors
come back. Vectors go to a file that is mapped, not loaded: what stays in memory is some hundred bytes a row, whatever
the encoder's width."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from flywheel_tasks.core.storage import Storage
from flywheel_tasks.core.tables import TableReader
from flywheel_tasks.curation.cluster import Quantised, Rows, quantise
from flywheel_tasks.curation.embed import EncoderSpec, embed, prompt_text

COLUMNS = ["prompt_id", "turns"]
_DIGEST = 16


@dataclass(frozen=True)
class Block:
    """One row group of a stored table; small enough to travel to a worker."""

    store_uri: str
    path: str
    row_group: int


@dataclass(frozen=True)
class TextRule:
    """Which words of a prompt are embedded, and the seed of its priority."""

    user_chars: int
    context_chars: int
    seed: int


@dataclass(frozen=True)
class Indexed:
    """A block's rows, its distinct texts by digest, and a vector for each of those."""

    ids: pa.Array
    text: Rows
    priority: NDArray[np.uint64]
    digests: list[bytes]
    vectors: Quantised
    valid: NDArray[np.bool_]


@dataclass(frozen=True)
class Corpus:
    """Rows of a prompt table and the distinct texts behind them.

    `text[i]` is the distinct text of row i, -1 where it has no user turn to answer; `priority` is a seeded hash of the
    prompt id, so that choices depend on which prompts there are and never on how they were filed.
    """

    ids: pa.ChunkedArray
    text: Rows
    priority: NDArray[np.uint64]
    vectors: Quantised
    valid: NDArray[np.bool_]

    def copies(self) -> NDArray[np.int64]:
        return np.bincount(self.text[self.text >= 0], minlength=len(self.valid))

    def order(self) -> Rows:
        """Distinct texts with a usable vector, by the priority of their first row."""
        first = np.full(len(self.valid), np.iinfo(np.uint64).max, dtype=np.uint64)
        present = self.text >= 0
        np.minimum.at(first, self.text[present], self.priority[present])
        usable = np.flatnonzero(self.valid)
        return usable[np.argsort(first[usable], kind="stable")]

    def rank(self) -> Rows:
        """Each row's place, by priority, among the rows of its text."""
        order = np.lexsort((self.priority, self.text))
        texts = self.text[order]
        starts = np.flatnonzero(np.diff(texts, prepend=texts[:1] - 1))
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
        return rank


def last_turns(turns: pa.ListArray) -> tuple[pa.Array, pa.Array, NDArray[np.bool_]]:
    """Contents of the last turn and of the one before it (null where there is none), and which rows end in a user
    turn."""
    offsets = turns.offsets.to_numpy()
    start, end = offsets[:-1], offsets[1:]
    some = end > start
    values = turns.values
    content = values.field("content")
    last = pa.array(end - 1, mask=~some)
    before = pa.array(end - 2, mask=end - start < 2)
    asks = pc.equal(values.field("role").take(last), "user").fill_null(False).to_numpy(zero_copy_only=False)
    return content.take(last), content.take(before), asks


def blocks(table: TableReader) -> list[Block]:
    """Every row group of a committed table, its files verified."""
    found = []
    for path in table.files:
        with table.storage.open(path) as stream:
            groups = pq.ParquetFile(stream).num_row_groups
        found += [Block(table.storage.uri, path, group) for group in range(groups)]
    return found


def index_block(block: Block, spec: EncoderSpec, rule: TextRule) -> Indexed:
    """Read, number and embed one block; runs on any worker."""
    with Storage(block.store_uri).open(block.path) as stream:
        table = pq.ParquetFile(stream).read_row_group(block.row_group, columns=COLUMNS)
    return index_table(table, lambda texts: embed(texts, spec), rule)


def index_table(table: pa.Table, embedder: Callable[[list[str]], NDArray[np.float32]], rule: TextRule) -> Indexed:
    """Distinct texts of some prompts, each embedded once."""
    last, before, asks = last_turns(table["turns"].combine_chunks())
    number: dict[str, int] = {}
    text = np.full(table.num_rows, -1, dtype=np.int64)
    for row, (request, context) in enumerate(zip(last.to_pylist(), before.to_pylist(), strict=True)):
        if asks[row]:
            words = prompt_text(request, context, rule.user_chars, rule.context_chars)
            text[row] = number.setdefault(words, len(number))
    ids = table["prompt_id"].combine_chunks()
    salt = rule.seed.to_bytes(16, "little", signed=True)
    priority = b"".join(_hash(prompt, salt)[:8] for prompt in ids.to_pylist())
    vectors, valid = quantise(embedder(list(number)))
    return Indexed(ids, text, np.frombuffer(priority, dtype="<u8"), [_hash(words) for words in number], vectors, valid)


def merge(indexed: Iterable[Indexed], scratch: Path) -> Corpus:
    """One corpus from blocks in order. A text seen before keeps its first vector; vectors are mapped from `scratch`."""
    number: dict[bytes, int] = {}
    ids: list[pa.Array] = []
    texts, priorities, valid = [np.empty(0, np.int64)], [np.empty(0, np.uint64)], [np.empty(0, bool)]
    width = 1
    with scratch.open("wb") as stream:
        for part in indexed:
            new = np.array([digest not in number for digest in part.digests], dtype=bool)
            place = np.array([number.setdefault(digest, len(number)) for digest in part.digests] + [-1], dtype=np.int64)
            ids.append(part.ids)
            texts.append(place[part.text])
            priorities.append(part.priority)
            valid.append(part.valid[new])
            width = part.vectors.shape[1]
            stream.write(part.vectors[new].tobytes())
    shape = (len(number), width)
    return Corpus(
        ids=pa.chunked_array(ids, pa.string()),
        text=np.concatenate(texts),
        priority=np.concatenate(priorities),
        vectors=np.memmap(scratch, np.int16, "r", shape=shape) if number else np.empty(shape, dtype=np.int16),
        valid=np.concatenate(valid),
    )


def _hash(words: str, salt: bytes = b"") -> bytes:
    return hashlib.blake2b(words.encode("utf-8", "surrogatepass"), digest_size=_DIGEST, salt=salt).digest()
