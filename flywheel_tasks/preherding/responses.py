"""Every response in the traffic with the signals that users gave it: what user-signal models learn from (Table 2)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
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


def responses(conversations: Iterable[pa.RecordBatch], jtbd: Mapping[str, str]) -> Iterator[pa.Table]:
    """One row for each response to a user, batch by batch; `jtbd` is by prompt id, where a prompt's job is known."""
    for batch in conversations:
        rows = [row for one in batch.to_pylist() for row in _of(one, jtbd)]
        yield pa.Table.from_pylist(rows, RESPONSES)


def _of(conversation: Mapping[str, Any], jtbd: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    name, turns = conversation["conversation_id"], conversation["turns"]
    shared = {key: conversation[key] for key in ("conversation_id", "user", "character_id", "split")}
    last = max((at for at, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    history: list[dict[str, str]] = []
    asked: int | None = None
    earlier: dict[str, bool | None] = dict.fromkeys(SIGNALS)
    for at, turn in enumerate(turns):
        if turn["role"] == "user":
            asked = at
        elif history and history[-1]["role"] == "assistant":
            history.pop()  # the user had this one generated again: nobody's context holds it
        if turn["role"] == "assistant" and asked is not None:
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


def first(tables: Iterable[pa.Table], most: int | None, seed: int) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Responses to train on, those held out, and the quarantine of what is over `most`: whole conversations by hash."""
    rows = pa.concat_tables([RESPONSES.empty_table(), *tables])
    is_train = pc.equal(rows["split"], "train")
    known, held_out = rows.filter(is_train), rows.filter(pc.invert(is_train))
    if most is None or known.num_rows <= most:
        return known, held_out, schemas.QUARANTINE.empty_table()
    names = known["conversation_id"].to_pylist()
    order = sorted(set(names), key=lambda name: hashlib.blake2b(f"{seed}\0{name}".encode()).digest())
    size = Counter(names)
    room, chosen = most, set()
    for name in order:
        if size[name] <= room:
            room -= size[name]
            chosen.add(name)
    taken = pa.array([name in chosen for name in names])
    return known.filter(taken), held_out, quarantined(known.filter(pc.invert(taken)), "row_id", "not_drawn")
