"""Prompts: every context that ends in a user turn, its marks for Table 1, and the near-policy mark (Sec. 3.5.2)."""

import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from flywheel_tasks.core import schemas
from flywheel_tasks.curation.prompts import PromptConfig, TurnMarks, cut

START = datetime.datetime(2026, 11, 16, tzinfo=datetime.UTC)


def conversation(number: int, turns: list[tuple[str, str]], **fields: Any) -> dict[str, Any]:
    logged = [{"role": role, "content": text, "at": START, "image": None, "signals": None} for role, text in turns]
    plain = {
        "conversation_id": f"c{number}",
        "user": "0" * 32,
        "character_id": "a",
        "source": "production",
        "locale": "en_US",
        "language": "en",
        "model_version": "V2",
        "split": "train",
        "turns": logged,
    }
    return plain | fields


def prompts(rows: list[dict[str, Any]], champion: str | None = "V2", **config: Any) -> pa.Table:
    table = pa.Table.from_pylist(rows, schema=schemas.CONVERSATION)
    count = sum(len(row["turns"]) for row in rows)
    marks = TurnMarks(np.full(count, "und", object), np.zeros(count, bool))
    return schemas.conform(cut(table, marks, champion, PromptConfig(**config)), schemas.PROMPT, "test")


TALKS = st.lists(
    st.lists(
        st.tuples(st.sampled_from(["user", "assistant"]), st.sampled_from(["hi", " ", "", "how are you", "ok 👍"])),
        max_size=12,
    ),
    max_size=6,
)


@given(TALKS, st.integers(1, 5))
def test_prompts_are_exactly_the_contexts_that_end_in_a_user_turn(
    talks: list[list[tuple[str, str]]], context: int
) -> None:
    expected = [
        (f"c{n}.{at}", talk[max(0, at - context + 1) : at + 1], not any(role == "user" for role, _ in talk[:at]))
        for n, talk in enumerate(talks)
        for at, (role, text) in enumerate(talk)
        if role == "user" and text.strip()
    ]
    rows = prompts([conversation(n, talk) for n, talk in enumerate(talks)], context_turns=context).to_pylist()
    found = [(r["prompt_id"], [(t["role"], t["content"]) for t in r["turns"]], r["first_turn"]) for r in rows]
    assert found == expected


def test_a_slice_of_a_table_gives_the_prompts_of_the_slice() -> None:
    rows = [conversation(n, [("assistant", "hello"), ("user", f"u{n}")]) for n in range(5)]
    table = pa.Table.from_pylist(rows, schema=schemas.CONVERSATION).slice(2, 2)
    found = cut(table, TurnMarks(np.full(4, "und", object), np.zeros(4, bool)), None, PromptConfig())
    assert [t[-1]["content"] for t in found["turns"].to_pylist()] == ["u2", "u3"]


def test_depth_counts_earlier_user_turns() -> None:
    talk = [(role, "x") for _ in range(25) for role in ("user", "assistant")]
    depth = prompts([conversation(0, talk)])["depth"].to_pylist()
    assert depth == ["first"] + ["short"] * 4 + ["medium"] * 15 + ["long"] * 5


def test_near_policy_is_the_champions_production_traffic_only() -> None:
    rows = [
        conversation(0, [("user", "a")]),
        conversation(1, [("user", "a")], model_version="V1"),
        conversation(2, [("user", "a")], model_version=None),
        conversation(3, [("user", "a")], source="internal"),
    ]
    assert prompts(rows)["near_policy"].to_pylist() == [True, False, False, False]
    assert prompts(rows, champion=None)["near_policy"].to_pylist() == [False] * 4


def test_what_belongs_to_the_conversation_is_copied() -> None:
    row = conversation(
        7,
        [("user", "a"), ("assistant", "b"), ("user", "c")],
        split="eval",
        locale="zz_ZZ",
        language="es",
        character_id="k",
    )
    for prompt in prompts([row]).to_pylist():
        assert {k: prompt[k] for k in ("split", "locale", "language", "character_id", "model_version", "user")} == {
            k: row[k] for k in ("split", "locale", "language", "character_id", "model_version", "user")
        }


def test_a_turn_too_short_for_a_language_takes_the_conversations() -> None:
    table = pa.Table.from_pylist(
        [conversation(0, [("user", "hola amigo"), ("user", "ok")], language="es")], schema=schemas.CONVERSATION
    )
    marks = TurnMarks(np.array(["pt", "und"], object), np.array([True, False]))
    found = cut(table, marks, None, PromptConfig())
    assert found["language"].to_pylist() == ["pt", "es"]
    assert found["code_mixed"].to_pylist() == [True, False]


def test_depth_bounds_must_rise() -> None:
    with pytest.raises(ValidationError, match="must rise"):
        PromptConfig(medium_from=30)


def test_a_response_that_was_generated_again_is_in_nobodys_context() -> None:
    row = conversation(
        0, [("user", "hi"), ("assistant", "dull"), ("assistant", "bright"), ("user", "more"), ("assistant", "last")]
    )
    silent = {"continued": None, "love": False, "thumb_up": False, "thumb_down": False, "feedback": None}
    for at in (1, 4):
        row["turns"][at]["signals"] = silent | {"regenerated": True}
    made = prompts([row]).to_pylist()
    assert [[turn["content"] for turn in prompt["turns"]] for prompt in made] == [["hi"], ["hi", "bright", "more"]]
    assert [prompt["turn_index"] for prompt in made] == [0, 3]
