"""Raw log lines → typed event columns. Nothing malformed passes, and every refusal says which field is wrong."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.schemas import EVENT


class Event(msgspec.Struct, gc=False):
    """One line of the raw log. Fields the contract does not know are ignored."""

    event_id: str
    type: Literal["message", "reaction", "feedback", "regenerate"]
    conversation_id: str
    message_id: str
    user_id: str
    character_id: str
    at: str
    role: Literal["user", "assistant"] | None = None
    content: str | None = None
    reaction: Literal["love", "thumb_up", "thumb_down"] | None = None
    model_version: str | None = None
    locale: str | None = None
    source: Literal["internal", "production"] | None = None
    image: str | None = None


_DECODER = msgspec.json.Decoder(Event)
_FIELD = re.compile(r" - at `\$(?:\[\d+\])?\.?(\w*)`")
_IDS = ("event_id", "conversation_id", "message_id", "user_id", "character_id")
_LONGEST_ID = 256
_OPENS, _CLOSES = b"{}"
_LOCALE = re.compile(
    r"[A-Za-z]{2,3}(?:[_-][A-Za-z]{4})?(?:[_-](?:[A-Za-z]{2}|[0-9]{3}))?(?:[_-][A-Za-z][A-Za-z0-9]{1,7}){0,2}"
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./:+=-]{0,255}")
_OPAQUE = re.compile(
    r"(?<![A-Za-z0-9])(?:[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}|(?=\d*[a-f])[0-9a-f]{8,64})(?![A-Za-z0-9])", re.I
)
"""A UUID or a digest: its digits are nobody's number."""
_LONG_NUMBER = re.compile(r"\d(?:[_./:+=-]?\d){8,}")
_EPOCH, _MICROSECOND = datetime.datetime(1970, 1, 1), datetime.timedelta(microseconds=1)
_FIRST_MOMENT, _LAST_MOMENT = ((m - _EPOCH) // _MICROSECOND for m in (datetime.datetime.min, datetime.datetime.max))
_LABELS = (
    ("locale", _LOCALE, "not a language tag such as en_US"),
    ("model_version", _VERSION, "not a plain name, or nine digits on end"),
    ("character_id", _NAME, "not a plain name, or nine digits on end"),
)
"""What travels unscrubbed into prompts, reports and exposures: it must have no room for an identifier."""
_REQUIRED = (("message", "role"), ("message", "content"), ("reaction", "reaction"), ("feedback", "content"))
NOT_UTF8 = "not UTF-8"


def parse_lines(block: bytes) -> tuple[pa.Table, np.ndarray, list[tuple[int, str, bytes]]]:
    """Typed events, the line of each (from 0), and the refused lines with their reasons. Blank lines are nothing."""
    lines = block.split(b"\n")
    numbers = [number for number, line in enumerate(lines) if line and line[0] == _OPENS and line[-1] == _CLOSES]
    refused: list[tuple[int, str, bytes]] = []
    try:
        events = _DECODER.decode_lines(block)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        events = []
    # As many objects as lines is not one a line: a line of two makes up for an object over two. But where every line
    # opens and closes a brace, no object crosses a line, for within one nothing opens right after a closing brace.
    if not len(events) == len(numbers) == len(lines) - lines.count(b""):
        numbers = [number for number, line in enumerate(lines) if line and not line.isspace()]
        events, numbers, refused = _parse_each(lines, numbers)
    table = _columns(events)
    return _check(table, np.asarray(numbers, np.int64), lines, refused)


def parse_table(table: pa.Table) -> tuple[pa.Table, np.ndarray, list[tuple[int, str, bytes]]]:
    """The same for a batch of a Parquet log; a row counts as a line."""
    names = [name for name in EVENT.names if name in table.schema.names]
    rows = _rows(_plain(table.select(names)))
    lines = [msgspec.json.encode({k: v for k, v in (row or {}).items() if v is not None}) for row in rows]
    events, numbers, refused = _parse_each(lines, [number for number, row in enumerate(rows) if row is not None])
    refused += [(number, NOT_UTF8, b"") for number, row in enumerate(rows) if row is None]
    return _check(_columns(events), np.asarray(numbers, np.int64), lines, refused)


def _rows(table: pa.Table) -> list[dict[str, Any] | None]:
    """The rows, with None for one whose text is no UTF-8."""
    try:
        return list(table.to_pylist())
    except UnicodeDecodeError:
        if table.num_rows == 1:
            return [None]
        half = table.num_rows // 2
        return _rows(table.slice(0, half)) + _rows(table.slice(half))


def _plain(table: pa.Table) -> pa.Table:
    """Columns as JSON would have them: text for bytes and dictionaries, times no finer than microseconds."""
    for index, field in enumerate(table.schema):
        kind = field.type
        if pa.types.is_dictionary(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            wanted = pa.string()
        elif pa.types.is_timestamp(kind):
            wanted = pa.timestamp("us", tz=kind.tz)
        else:
            continue
        try:
            table = table.set_column(index, field.name, pc.cast(table.column(index), wanted, safe=False))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise InputError(
                f"column '{field.name}' of a Parquet log has type {kind} and is no text: {error}"
            ) from error
    return table


def _parse_each(
    lines: Sequence[bytes], numbers: Iterable[int]
) -> tuple[list[Event], list[int], list[tuple[int, str, bytes]]]:
    events, good, refused = [], [], []
    for number in numbers:
        try:
            events.append(_DECODER.decode(lines[number]))
            good.append(number)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            refused.append((number, _reason(error), lines[number]))
    return events, good, refused


def _reason(error: Exception) -> str:
    """A reason that can be counted: which field, which fault, never the value."""
    text = str(error)
    if isinstance(error, UnicodeDecodeError):
        return NOT_UTF8
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if not isinstance(error, msgspec.ValidationError):
        return "malformed JSON"
    where = _FIELD.search(text)
    field = where[1] if where and where[1] else ""
    if text.startswith("Object missing required field"):
        return f"missing {text.split('`')[1]}"
    if text.startswith("Invalid"):
        return f"{field or 'value'}: not a legal value"
    expected = re.match(r"Expected `([^`]+)`, got `([^`]+)`", text)
    return (
        f"{field or 'line'}: expected {expected[1]}, got {expected[2]}" if expected else f"{field or 'line'}: invalid"
    )


def _is_label(value: str | None, shape: re.Pattern[str]) -> bool:
    """Whether a label has its shape, and no number in it that may be a person's."""
    return value is None or (shape.fullmatch(value) is not None and not _LONG_NUMBER.search(_OPAQUE.sub("", value)))


def _columns(events: Sequence[Event]) -> pa.Table:
    arrays = [pa.array([getattr(event, name) for event in events], pa.string()) for name in EVENT.names if name != "at"]
    table = pa.Table.from_arrays(arrays, [name for name in EVENT.names if name != "at"])
    return table.append_column("at", _timestamps([event.at for event in events]))


def _timestamps(texts: list[str]) -> pa.Array:
    """ISO 8601 with a zone → UTC; null where it is not one, or lies outside what dates can be."""
    utc = pa.timestamp("us", tz="UTC")
    try:
        moments = pa.array(texts, pa.string()).cast(utc)
    except pa.ArrowInvalid:
        return pa.array([_timestamp(text) for text in texts], utc)
    since = pc.cast(moments, pa.int64())
    real = pc.and_(pc.greater_equal(since, _FIRST_MOMENT), pc.less_equal(since, _LAST_MOMENT))
    return pc.if_else(real, moments, pa.scalar(None, utc))


def _timestamp(text: str) -> datetime.datetime | None:
    try:
        moment = datetime.datetime.fromisoformat(text)
        return moment.astimezone(datetime.UTC) if moment.tzinfo else None
    except (ValueError, OverflowError):
        return None


def _check(
    table: pa.Table, numbers: np.ndarray, lines: Sequence[bytes], refused: list[tuple[int, str, bytes]]
) -> tuple[pa.Table, np.ndarray, list[tuple[int, str, bytes]]]:
    """The rules a type cannot say: real times, usable ids, plain labels, what each kind of event must carry."""
    bad = pa.array(np.full(len(table), None), pa.string())
    bad = pc.if_else(pc.is_null(table["at"]), "at: not a time with a zone (ISO 8601)", bad)
    for name in _IDS:
        length = pc.binary_length(table[name])
        bad = pc.if_else(pc.equal(length, 0), f"{name}: empty", bad)
        bad = pc.if_else(pc.greater(length, _LONGEST_ID), f"{name}: longer than {_LONGEST_ID} bytes", bad)
    for name, shape, fault in _LABELS:
        if odd := [value for value in pc.unique(table[name]).to_pylist() if not _is_label(value, shape)]:
            bad = pc.if_else(pc.is_in(table[name], pa.array(odd, pa.string())), f"{name}: {fault}", bad)
    for kind, name in _REQUIRED:
        absent = pc.and_(pc.equal(table["type"], kind), pc.is_null(table[name]))
        bad = pc.if_else(absent, f"missing {name}", bad)
    if isinstance(bad, pa.ChunkedArray):
        bad = bad.combine_chunks()
    if bad.null_count == len(bad):
        return table.select(EVENT.names), numbers, refused
    wrong = np.flatnonzero(pc.is_valid(bad).to_numpy(zero_copy_only=False))
    refused = refused + [(int(numbers[i]), bad[int(i)].as_py(), lines[int(numbers[i])]) for i in wrong]
    good = pc.is_null(bad)
    return table.filter(good).select(EVENT.names), numbers[good.to_numpy(zero_copy_only=False)], refused
