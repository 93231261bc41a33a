"""Events of some users → their conversations and daily activity (Sec. 2.2.1, Table 2). Pure functions on Arrow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from flywheel_tasks.core import schemas

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

SPILLED = pa.schema([*schemas.EVENT, pa.field("chunk", pa.int32()), pa.field("line", pa.int64())])
"""A parsed event with pseudonymous `user_id` and `conversation_id`, and its place: chunk of the logs, line in it."""

CONFLICT = "conflicting event_id"
_MINUTE = 60_000_000
_DAY = 1440 * _MINUTE
_REAL_SHARE = 0.01
"""A day of the logs has at least this share of the busiest day's events; fewer are clocks that run ahead."""
_WHAT_HAPPENED = ("type", "message_id", "role", "content", "reaction", "image")
"""What a retry of an event repeats. Its time and the labels of its client may differ."""

Days = dict[int, tuple[int, int]]
"""Day (from the epoch, UTC) → how many events it has, and the time of its last."""


@dataclass(frozen=True)
class Rules:
    """What decides a conversation's signals and side; times in microseconds since the epoch, UTC."""

    log_end: int
    continue_minutes: int
    eval_share: float


def days(at: pa.ChunkedArray) -> Days:
    """The days that events fall on."""
    moments = pc.cast(at, pa.int64())
    number = pc.cast(pc.cast(at, pa.date32()), pa.int32())
    found = pa.table({"day": number, "at": moments}).group_by("day").aggregate([("at", "count"), ("at", "max")])
    return {
        day: (count, last)
        for day, count, last in zip(*(found[c].to_pylist() for c in ("day", "at_count", "at_max")), strict=True)
    }


def merged(parts: Iterable[Days]) -> Days:
    """The days of all parts together."""
    whole: Days = {}
    for part in parts:
        for day, (count, last) in part.items():
            before, latest = whole.get(day, (0, last))
            whole[day] = (before + count, max(latest, last))
    return whole


def log_end(found: Days) -> int:
    """The last event of the last real day. One clock that runs ahead must not tell when the logs end: every
    conversation that is open at that moment would count as left."""
    busiest = max((count for count, _ in found.values()), default=0)
    return max((last for count, last in found.values() if count >= _REAL_SHARE * busiest), default=0)


@dataclass(frozen=True)
class Assembled:
    conversations: pa.Table
    activity: pa.Table
    rejected: pa.Table
    """`reason`, `chunk`, `line`, `user_id` of each event that found no place."""
    accepted: int


def assemble(events: pa.Table, rules: Rules) -> Assembled:
    """All events of some users, in any order and with repeats, to conversations in order of id."""
    received = len(events)
    events, early = _by_then(events, rules.log_end)
    events, repeated = _without_repeats(events)
    is_message = pc.equal(events["type"], "message")
    messages = _in_order(events.filter(is_message))
    messages, doubled = _one_per_message_id(messages)
    signals, orphans = _attach(messages, events.filter(pc.invert(is_message)))
    rejected = pa.concat_tables([early, repeated, doubled, orphans])
    starts = _group_starts(_groups(messages["conversation_id"]))
    turns = _turns(messages, starts, signals, rules)
    return Assembled(
        conversations=_conversations(messages, starts, turns, rules),
        activity=activity(messages),
        rejected=rejected,
        accepted=received - len(rejected),
    )


def activity(messages: pa.Table) -> pa.Table:
    """Sends per user and UTC day."""
    sent = messages.filter(pc.equal(messages["role"], "user"))
    days = pc.cast(sent["at"], pa.date32())
    counted = (
        pa.table({"unit_id": sent["user_id"], "day": days}).group_by(["unit_id", "day"]).aggregate([([], "count_all")])
    )
    counted = counted.rename_columns({"count_all": "sends"}).select(schemas.ACTIVITY.names)
    return counted.sort_by([("unit_id", "ascending"), ("day", "ascending")]).cast(schemas.ACTIVITY)


def _groups(column: pa.ChunkedArray) -> Ints:
    """A number for each distinct value, in no particular order."""
    return column.combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)


def _codes(column: pa.ChunkedArray) -> Ints:
    """A number for each distinct value, in order of the values."""
    encoded = column.combine_chunks().dictionary_encode()
    ranks = pc.rank(encoded.dictionary, tiebreaker="dense").to_numpy().astype(np.int64)
    return ranks[encoded.indices.to_numpy()]


def _group_starts(codes: Ints) -> Ints:
    """Where each run of equal codes begins."""
    return np.flatnonzero(np.r_[True, codes[1:] != codes[:-1]]) if len(codes) else np.zeros(0, np.int64)


def _place(table: pa.Table) -> tuple[Ints, Ints]:
    return table["line"].to_numpy(), table["chunk"].to_numpy()


def _rejection(table: pa.Table, reason: str) -> pa.Table:
    columns = table.select(["chunk", "line", "user_id"])
    return columns.add_column(0, pa.field("reason", pa.string()), pa.array([reason] * len(table), pa.string()))


def _by_then(events: pa.Table, log_end: int) -> tuple[pa.Table, pa.Table]:
    """Without what is dated more than a day after the logs end: no such moment has been."""
    beyond = pc.greater(pc.cast(events["at"], pa.int64()), log_end + _DAY)
    if not pc.any(beyond).as_py():
        return events, _rejection(events.slice(0, 0), "at_beyond_log")
    return events.filter(pc.invert(beyond)), _rejection(events.filter(beyond), "at_beyond_log")


def _first_of_each(table: pa.Table, name: str) -> tuple[pa.Table, Ints, Ints]:
    """By (conversation, `name`): the events that stand first in the logs; then the rows of their repeats, and for each
    of these the row of the first."""
    conversation, other = _groups(table["conversation_id"]), _groups(table[name])
    order = np.lexsort((*_place(table), other, conversation))
    repeat = np.zeros(len(order), np.bool_)
    repeat[1:] = (conversation[order][1:] == conversation[order][:-1]) & (other[order][1:] == other[order][:-1])
    first = order[np.maximum.accumulate(np.where(repeat, 0, np.arange(len(order))))]
    keep = np.ones(len(order), np.bool_)
    keep[order[repeat]] = False
    return table.filter(pa.array(keep)), order[repeat], first[repeat]


def _without_repeats(events: pa.Table) -> tuple[pa.Table, pa.Table]:
    """A client that sends an event again says the same again. What says something else is another event under an id
    that is taken: which of them is true nobody knows, so the first stays and the others are told apart from retries."""
    kept, rows, firsts = _first_of_each(events, "event_id")
    again, first = (events.take(pa.array(which)) for which in (rows, firsts))
    same = np.ones(len(rows), np.bool_)
    for name in _WHAT_HAPPENED:
        one, other = again[name], first[name]
        equal = pc.coalesce(pc.equal(one, other), pc.and_(pc.is_null(one), pc.is_null(other)))
        same &= equal.to_numpy().astype(np.bool_)
    retried, conflicts = again.filter(pa.array(same)), again.filter(pa.array(~same))
    return kept, pa.concat_tables([_rejection(retried, "duplicate event_id"), _rejection(conflicts, CONFLICT)])


def _one_per_message_id(messages: pa.Table) -> tuple[pa.Table, pa.Table]:
    kept, rows, _ = _first_of_each(messages, "message_id")
    return kept, _rejection(messages.take(pa.array(rows)), "duplicate message_id")


def _in_order(messages: pa.Table) -> pa.Table:
    """By conversation, then time; messages of one instant stay in the order of the logs."""
    order = np.lexsort(
        (*_place(messages), pc.cast(messages["at"], pa.int64()).to_numpy(), _codes(messages["conversation_id"]))
    )
    return messages.take(pa.array(order))


def _attach(messages: pa.Table, others: pa.Table) -> tuple[dict[str, Any], pa.Table]:
    """Reactions, feedback and regenerations to the assistant message they are about."""
    others = _in_order(others)
    about = pc.index_in(_address(others), value_set=_address(messages))
    found = pc.is_valid(about).to_numpy(zero_copy_only=False)
    row = pc.fill_null(about, 0).to_numpy(zero_copy_only=False).astype(np.int64)
    by_assistant = np.append(_equal(messages["role"], "assistant"), False)
    good = found & by_assistant[row]
    misplaced = found & ~good
    kind = others["type"]
    signals: dict[str, Any] = {}
    for name in schemas.REACTIONS:
        signals[name] = _flag(len(messages), row[good & _equal(others["reaction"], name) & _equal(kind, "reaction")])
    signals["regenerated"] = _flag(len(messages), row[good & _equal(kind, "regenerate")])
    signals["feedback"] = _joined(len(messages), row, good & _equal(kind, "feedback"), others["content"])
    lost = pa.concat_tables(
        [
            _rejection(others.filter(pa.array(~found)), "unknown message_id"),
            _rejection(others.filter(pa.array(misplaced)), "signal on a user message"),
        ]
    )
    return signals, lost


def _address(table: pa.Table) -> pa.Array:
    """The conversation's id has a fixed length, so the joined text is unambiguous."""
    joined = pc.binary_join_element_wise(table["conversation_id"], table["message_id"], "")
    return joined.combine_chunks() if isinstance(joined, pa.ChunkedArray) else joined


def _equal(column: pa.ChunkedArray, value: str) -> Bools:
    return pc.fill_null(pc.equal(column, value), False).to_numpy().astype(np.bool_)


def _flag(size: int, rows: Ints) -> Bools:
    flags = np.zeros(size, np.bool_)
    flags[rows] = True
    return flags


def _joined(size: int, row: Ints, chosen: Bools, texts: pa.ChunkedArray) -> pa.Array:
    """Several pieces of feedback on one message are all kept, in order of time."""
    said: list[str | None] = [None] * size
    for number in np.flatnonzero(chosen):
        text, before = texts[int(number)].as_py(), said[row[number]]
        said[row[number]] = text if before is None else f"{before}\n{text}"
    return pa.array(said, pa.string())


def _turns(messages: pa.Table, starts: Ints, signals: dict[str, Any], rules: Rules) -> pa.Array:
    at = pc.cast(messages["at"], pa.int64()).to_numpy()
    by_user = _equal(messages["role"], "user")
    struct = pa.StructArray.from_arrays(
        [
            _continued(at, by_user, starts, rules),
            *(pa.array(signals[name]) for name in schemas.REACTIONS),
            signals["feedback"],
            pa.array(signals["regenerated"]),
        ],
        fields=list(schemas.SIGNALS),
        mask=pa.array(by_user),
    )
    columns = [messages[name].combine_chunks() for name in ("role", "content", "at", "image")]
    unheard = pa.nulls(len(messages), pa.string())  # the filter tells the language, after it has cleaned the text
    return pa.StructArray.from_arrays([*columns, unheard, struct], fields=list(schemas.LOGGED_TURN))


def _continued(at: Ints, by_user: Bools, starts: Ints, rules: Rules) -> pa.Array:
    """p(continue)'s label (Table 2): the user wrote again within the window; null where the log ends before that."""
    size = len(at)
    positions = np.where(by_user, np.arange(size), size)
    next_user = np.minimum.accumulate(positions[::-1])[::-1] if size else positions
    ends = np.repeat(np.r_[starts[1:], size], np.diff(np.r_[starts, size])) if size else positions
    window = rules.continue_minutes * _MINUTE
    exists = next_user < ends
    waited = at[np.where(exists, next_user, 0)] - at if size else at
    continued = exists & (waited <= window)
    unknown = ~continued & ~exists & (rules.log_end - at < window)
    return pa.array(continued, mask=unknown)


def _conversations(messages: pa.Table, starts: Ints, turns: pa.Array, rules: Rules) -> pa.Table:
    offsets = np.r_[starts, len(messages)].astype(np.int32)
    first = messages.take(pa.array(starts))
    codes = np.repeat(np.arange(len(starts)), np.diff(offsets))
    split = np.where(_share(first["conversation_id"]) < rules.eval_share, "eval", "train")
    columns = {
        "conversation_id": first["conversation_id"],
        "user": first["user_id"],
        "character_id": first["character_id"],
        "source": pc.fill_null(first["source"], "production"),
        "locale": pc.fill_null(_edge(messages["locale"], codes, len(starts), last=False), "und"),
        "language": pa.nulls(len(starts), pa.string()),
        "model_version": _edge(messages["model_version"], codes, len(starts), last=True),
        "split": pa.array(split.tolist(), pa.string()),
        "turns": pa.ListArray.from_arrays(pa.array(offsets), turns, type=pa.list_(schemas.LOGGED_TURN)),
    }
    return pa.table(columns, schema=schemas.CONVERSATION)


def _share(ids: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """A conversation's place in [0, 1), fixed by its keyed id: the same in every cycle."""
    return np.array([int(text[:13], 16) for text in ids.to_pylist()], np.float64) / 16.0**13


def _edge(column: pa.ChunkedArray, codes: Ints, groups: int, *, last: bool) -> pa.Array:
    """The first or last value that is there, for each group."""
    rows = np.flatnonzero(pc.is_valid(column).to_numpy())
    chosen = np.full(groups, -1, np.int64)
    rows = rows if last else rows[::-1]
    chosen[codes[rows]] = rows
    taken = column.take(pa.array(chosen, mask=chosen < 0))
    return taken.combine_chunks() if isinstance(taken, pa.ChunkedArray) else taken
