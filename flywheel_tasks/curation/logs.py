"""Raw log files as blocks of whole lines: plain, gzip, zstd or Parquet, in ranges that workers can share."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.manifest import SourceRecord
from flywheel_tasks.core.storage import open_external

_BLOCK = 2 << 20
_PARQUET_ROWS = 1 << 15
_EXPANSION = {"gz": 6, "zst": 6, "parquet": 4}
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


@dataclass(frozen=True)
class Chunk:
    """A piece of one log file: a byte range of plain text, or a whole file of the other kinds."""

    index: int
    source: int
    name: str
    uri: str
    start: int
    end: int


@dataclass(frozen=True)
class TooLong:
    """A line that was skipped because it is longer than allowed; its beginning stands for it."""

    head: bytes


def cut(sources: Sequence[SourceRecord], chunk_bytes: int) -> list[Chunk]:
    """Plain logs are cut into ranges of about `chunk_bytes`; compressed and Parquet logs stay whole."""
    chunks: list[Chunk] = []
    for number, source in enumerate(sources):
        if not source.name.endswith(SUFFIXES):
            raise InputError(f"{source.uri}: not a log file: its name must end in {', '.join(SUFFIXES)}")
        step = chunk_bytes if source.name.endswith(".jsonl") else max(source.bytes, 1)
        for start in range(0, max(source.bytes, 1), step):
            end = min(start + step, source.bytes)
            chunks.append(Chunk(len(chunks), number, source.name, source.uri, start, end))
    return chunks


def weight(chunk: Chunk) -> int:
    """About how many bytes of events the chunk holds."""
    return (chunk.end - chunk.start) * _EXPANSION.get(chunk.name.rsplit(".", 1)[-1], 1)


def grouped(chunks: Sequence[Chunk], group_bytes: int) -> list[tuple[Chunk, ...]]:
    """Neighbouring small chunks together, so that a task is worth starting."""
    groups: list[list[Chunk]] = []
    room = 0
    for chunk in chunks:
        if not groups or weight(chunk) > room:
            groups.append([])
            room = group_bytes
        groups[-1].append(chunk)
        room -= weight(chunk)
    return [tuple(group) for group in groups]


def line_blocks(chunk: Chunk, longest: int) -> Iterator[bytes | TooLong]:
    """The chunk's lines, many to a block. A line belongs to the chunk in which it begins."""
    try:
        with open_external(chunk.uri) as raw:
            if chunk.name.endswith(".jsonl"):
                yield from _range_lines(raw, chunk, longest)
            else:
                yield from _whole_lines(_decompressed(raw, chunk), longest)
    except (EOFError, zlib.error, OSError) as error:
        raise InputError(f"{chunk.uri}: cannot be read to its end ({error}): copy the file again") from error


def tables(chunk: Chunk) -> Iterator[pa.Table]:
    """The batches of a Parquet log."""
    try:
        with open_external(chunk.uri) as raw:
            for batch in pq.ParquetFile(raw).iter_batches(batch_size=_PARQUET_ROWS):
                yield pa.Table.from_batches([batch])
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{chunk.uri}: not a readable Parquet file ({str(error).splitlines()[0]})") from error


def _decompressed(raw: Any, chunk: Chunk) -> Any:
    if chunk.name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    return pa.input_stream(raw, compression="zstd")


def _range_lines(raw: Any, chunk: Chunk, longest: int) -> Iterator[bytes | TooLong]:
    position = chunk.start
    if position:
        raw.seek(position - 1)
        position = chunk.start - 1 + _skip_line(raw)
    raw.seek(position)
    remaining = chunk.end - position
    rest = b""
    while remaining > 0:
        block = raw.read(min(_BLOCK, remaining))
        if not block:
            break
        remaining -= len(block)
        if remaining <= 0 and not block.endswith(b"\n"):
            block += _to_line_end(raw, longest)
        rest = yield from _emit(rest + block, longest)
    if rest:
        yield from _last(rest, longest)


def _whole_lines(stream: Any, longest: int) -> Iterator[bytes | TooLong]:
    rest = b""
    while block := stream.read(_BLOCK):
        rest = yield from _emit(rest + block, longest)
        if len(rest) > longest:
            yield TooLong(rest[:longest])
            rest = yield from _emit(_after_line(stream), longest)
    if rest:
        yield from _last(rest, longest)


def _emit(data: bytes, longest: int) -> Generator[bytes | TooLong, None, bytes]:
    """Whole lines of `data`; returns what follows the last line end. Lines past the limit are told apart."""
    cut_at = data.rfind(b"\n") + 1
    whole = data[:cut_at]
    if whole and _longest_line(whole) > longest:
        for line in whole.split(b"\n")[:-1]:
            yield TooLong(line[:longest]) if len(line) > longest else line + b"\n"
    elif whole:
        yield whole
    return data[cut_at:]


def _last(rest: bytes, longest: int) -> Iterator[bytes | TooLong]:
    yield TooLong(rest[:longest]) if len(rest) > longest else rest


def _longest_line(data: bytes) -> int:
    if len(data) <= 1:
        return 0
    return max(map(len, data.split(b"\n")))


def _skip_line(raw: Any) -> int:
    """Read up to and including the next line end; returns how many bytes that was."""
    skipped = 0
    while block := raw.read(1 << 16):
        found = block.find(b"\n")
        if found >= 0:
            return skipped + found + 1
        skipped += len(block)
    return skipped


def _to_line_end(raw: Any, longest: int) -> bytes:
    """The rest of the line under way; a line past the limit is read no further than the limit."""
    parts: list[bytes] = []
    size = 0
    while size <= longest and (block := raw.read(1 << 16)):
        found = block.find(b"\n")
        if found >= 0:
            return b"".join([*parts, block[: found + 1]])
        parts.append(block)
        size += len(block)
    return b"".join(parts)


def _after_line(stream: Any) -> bytes:
    """Skip the rest of an overlong line; returns what was read beyond it."""
    while block := stream.read(_BLOCK):
        found = block.find(b"\n")
        if found >= 0:
            return cast(bytes, block[found + 1 :])
    return b""
