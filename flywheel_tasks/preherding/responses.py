"""Every response in the traffic with the signals that users gave it: what user-signal models learn from (Table 2)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from flywheel_tasks.core import schemas
from flywheel_tasks.core.quarantine import quarantined

SIGNALS = ("continue", "love", "thumb_up", "thumb_down", "feedback")
"""Table 2, in its order."""

_TEXT, _FLAG = pa.string(), pa.bool_()
RESPONSES = pa.schema(
    [
        *(
            (name, _TEXT)
            for name in ("row_id", "prompt_id", "conversation_id", "user", "character_id", "split", "jtbd")
        ),
        ("turns", pa.list_(schemas.TURN)),
        ("response", _TEXT),
        *((name, _FLAG) for name in SIGNALS),
        ("is_last", _FLAG),
        *((f"earlier_{name}", _FLAG) for name in SIGNALS),
    ]
)
"""`earlier_*` is the signal on the response before, null where there is none."""
LISTED = pa.schema([RESPONSES.field(name) for name in ("row_id", "conversation_id", "user", "split")])
_TURNS = 1 << 16


def listed(conversations: Iterable[pa.RecordBatch]) -> pa.Table:
    """Every response to a user by name alone: what a choice among them needs."""
    tables = [LISTED.empty_table()]
    for batch in conversations:
        columns = (batch.column(name).to_pylist() for name in ("conversation_id", "user", "split"))
        rows = [
            {"row_id": f"{name}.{at}", "conversation_id": name, "user": user, "split": split}
            for name, user, split, roles in zip(*columns, _roles(batch.column("turns")), strict=True)
            for at in _answers(roles)
        ]
        tables.append(pa.Table.from_pylist(rows, LISTED))
    return pa.concat_tables(tables)


def responses(
    conversations: Iterable[pa.RecordBatch], jtbd: Mapping[str, str], turns: int = _TURNS
) -> Iterator[pa.Table]:
    """One row for each response to a user; `jtbd` is by prompt id, where a prompt's job is known. Each repeats its
    history, which is quadratic in a long conversation: a table ends where its histories have so many turns."""
    rows: list[dict[str, Any]] = []
    held = 0
    for batch in conversations:
        for row in (row for one in batch.to_pylist() for row in _of(one, jtbd)):
            rows.append(row)
            held += len(row["turns"])
            if held >= turns:
                yield pa.Table.from_pylist(rows, RESPONSES)
                rows, held = [], 0
    if rows:
        yield pa.Table.from_pylist(rows, RESPONSES)


def _roles(turns: pa.ListArray) -> list[list[str]]:
    found: list[list[str]] = pa.ListArray.from_arrays(turns.offsets, pc.struct_field(turns.values, "role")).to_pylist()
    return found


def _answers(roles: Sequence[str]) -> list[int]:
    """Where a conversation's responses to its user are: a greeting answers nobody."""
    asked = roles.index("user") if "user" in roles else len(roles)
    return [at for at, role in enumerate(roles) if role == "assistant" and at > asked]


def _of(conversation: Mapping[str, Any], jtbd: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    name, turns = conversation["conversation_id"], conversation["turns"]
    shared = {key: conversation[key] for key in ("conversation_id", "user", "character_id", "split")}
    last = max((at for at, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    answers = set(_answers([turn["role"] for turn in turns]))
    history: list[dict[str, str]] = []
    asked: int | None = None
    earlier: dict[str, bool | None] = dict.fromkeys(SIGNALS)
    for at, turn in enumerate(turns):
        if turn["role"] == "user":
            asked = at
        elif history and history[-1]["role"] == "assistant":
            history.pop()  # the user had this one generated again: nobody's context holds it
        if at in answers:
            labels = _labels(turn["signals"])
            prompt_id = f"{name}.{asked}"
            yield {
                **shared,
                "row_id": f"{name}.{at}",
                "prompt_id": prompt_id,
                "jtbd": jtbd.get(prompt_id),
                "turns": list(history),
                "response": turn["content"],
                **labels,
                "is_last": at == last,
                **{f"earlier_{signal}": value for signal, value in earlier.items()},
            }
            earlier = labels
        history.append({"role": turn["role"], "content": turn["content"]})


def _labels(signals: Mapping[str, Any] | None) -> dict[str, bool | None]:
    if signals is None:
        return dict.fromkeys(SIGNALS)
    return {
        "continue": signals["continued"],
        "love": signals["love"],
        "thumb_up": signals["thumb_up"],
        "thumb_down": signals["thumb_down"],
        "feedback": signals["feedback"] is not None,
    }


def first(
    rows: pa.Table, most: int | None, most_held_out: int | None, seed: int
) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Of what is listed, the responses to train on, those held out, and the quarantine of what is over the limit of
    each."""
    is_train = pc.equal(rows["split"], "train")
    known, over = _at_most(rows.filter(is_train), most, seed)
    held_out, beyond = _at_most(rows.filter(pc.invert(is_train)), most_held_out, seed)
    return known, held_out, quarantined(pa.concat_tables([over, beyond]), "row_id", "not_drawn")


def _at_most(rows: pa.Table, most: int | None, seed: int) -> tuple[pa.Table, pa.Table]:
    """Whole conversations by hash."""
    if most is None or rows.num_rows <= most:
        return rows, rows.slice(0, 0)
    names = rows["conversation_id"].to_pylist()
    order = sorted(set(names), key=lambda name: hashlib.blake2b(f"{seed}\0{name}".encode()).digest())
    size = Counter(names)
    room, chosen = most, set()
    for name in order:
        if size[name] <= room:
            room -= size[name]
            chosen.add(name)
    taken = pa.array([name in chosen for name in names])
    return rows.filter(taken), rows.filter(pc.invert(taken))
