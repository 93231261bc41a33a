"""Signals stay with the response they are about, and whole conversations are drawn."""

from __future__ import annotations

import datetime
from typing import Any

import pyarrow as pa

from flywheel_tasks.core import schemas
from flywheel_tasks.preherding.responses import SIGNALS, first, listed, responses

AT = datetime.datetime(2026, 11, 16, tzinfo=datetime.UTC)
NONE = {
    "continued": None,
    "love": False,
    "thumb_up": False,
    "thumb_down": False,
    "feedback": None,
    "regenerated": False,
}


def turn(role: str, content: str, **signals: Any) -> dict[str, Any]:
    told = NONE | signals if role == "assistant" else None
    return {"role": role, "content": content, "at": AT, "image": None, "language": "en", "signals": told}


def conversation(name: str, turns: list[dict[str, Any]], split: str = "train") -> dict[str, Any]:
    return {
        "conversation_id": name, "user": "0" * 32, "character_id": "maya", "source": "production", "locale": "en_US",
        "language": "en", "model_version": "v1", "split": split, "turns": turns,
    }  # fmt: skip


def rows(*conversations: dict[str, Any], jtbd: dict[str, str] | None = None) -> list[dict[str, Any]]:
    table = pa.Table.from_pylist(list(conversations), schemas.CONVERSATION)
    return [row for found in responses(table.to_batches(), jtbd or {}) for row in found.to_pylist()]


def test_each_response_has_its_context_its_signals_and_those_of_the_one_before() -> None:
    turns = [
        turn("user", "hi"),
        turn("assistant", "hello!", continued=True, love=True),
        turn("user", "and then?"),
        turn("assistant", "the end", continued=False, feedback="too short"),
    ]
    one, two = rows(conversation("c", turns), jtbd={"c.2": "story"})
    assert [t["content"] for t in two["turns"]] == ["hi", "hello!", "and then?"]
    assert {name: one[name] for name in SIGNALS} == {
        "continue": True, "love": True, "thumb_up": False, "thumb_down": False, "feedback": False,
    }  # fmt: skip
    assert (two["continue"], two["feedback"], two["earlier_love"], two["jtbd"]) == (False, True, True, "story")
    assert (one["is_last"], two["is_last"], one["earlier_continue"]) == (False, True, None)


def test_a_response_that_was_generated_again_is_learned_from_but_is_in_nobodys_context() -> None:
    turns = [
        turn("user", "hi"),
        turn("assistant", "meh", regenerated=True),
        turn("assistant", "hello!", thumb_up=True),
        turn("user", "better"),
        turn("assistant", "glad"),
    ]
    found = rows(conversation("c", turns))
    assert [row["response"] for row in found] == ["meh", "hello!", "glad"]
    assert [t["content"] for t in found[1]["turns"]] == ["hi"]
    assert [t["content"] for t in found[2]["turns"]] == ["hi", "hello!", "better"]
    assert {row["prompt_id"] for row in found} == {"c.0", "c.3"}


def test_a_greeting_answers_nobody_and_is_context_only() -> None:
    found = rows(conversation("c", [turn("assistant", "welcome"), turn("user", "hi"), turn("assistant", "hello")]))
    assert [row["response"] for row in found] == ["hello"]
    assert [t["content"] for t in found[0]["turns"]] == ["welcome", "hi"]


def test_what_is_over_the_limit_is_left_out_by_whole_conversations() -> None:
    pair = [turn("user", "hi"), turn("assistant", "a", continued=True), turn("user", "b"), turn("assistant", "c")]
    many = [conversation(f"c{i}", pair, split="eval" if i == 0 else "train") for i in range(11)]
    found = listed(pa.Table.from_pylist(many, schemas.CONVERSATION).to_batches())
    known, held_out, skipped = first(found, 7, None, seed=1)
    assert (known.num_rows, held_out.num_rows, skipped.num_rows) == (6, 2, 14)
    names = known["conversation_id"].to_pylist()
    assert all(names.count(name) == 2 for name in names)


def test_what_is_held_out_has_a_limit_of_its_own() -> None:
    pair = [turn("user", "hi"), turn("assistant", "a"), turn("user", "b"), turn("assistant", "c")]
    many = [conversation(f"c{i}", pair, split="eval" if i % 2 else "train") for i in range(10)]
    found = listed(pa.Table.from_pylist(many, schemas.CONVERSATION).to_batches())
    known, held_out, skipped = first(found, None, 5, seed=1)
    assert (known.num_rows, held_out.num_rows) == (10, 4)
    assert skipped["reason"].to_pylist() == ["not_drawn"] * 6
    assert not set(skipped["row_id"].to_pylist()) & set(held_out["row_id"].to_pylist())


def test_a_list_names_the_responses_that_rows_are_made_of() -> None:
    talk = [
        turn("assistant", "welcome"), turn("user", "hi"), turn("assistant", "meh"), turn("assistant", "hello"),
        turn("user", "so"), turn("assistant", "yes"),
    ]  # fmt: skip
    talks = [talk, [turn("assistant", "nobody came")], talk[1:3], [turn("user", "hm")]]
    table = pa.Table.from_pylist([conversation(f"c{i}", t) for i, t in enumerate(talks)], schemas.CONVERSATION)
    for batches in (table.to_batches(), table.slice(2).to_batches(), table.to_batches(max_chunksize=1)):
        named = listed(batches)
        made = pa.concat_tables(responses(batches, {}))
        assert named.equals(made.select(named.column_names))


def test_long_conversations_come_in_tables_of_bounded_size() -> None:
    length = 60
    talk = [turn(("user", "assistant")[at % 2], f"{at}") for at in range(length)]
    table = pa.Table.from_pylist([conversation(f"c{i}", talk) for i in range(4)], schemas.CONVERSATION)
    tables = list(responses(table.to_batches(), {}, turns=200))
    assert max(sum(len(row["turns"]) for row in found.to_pylist()) for found in tables) < 200 + length
    assert pa.concat_tables(tables).equals(pa.concat_tables(responses(table.to_batches(), {})).combine_chunks())
