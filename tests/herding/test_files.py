"""Delivered examples and preferences: what keeps the contract is read, other lines are refused by place and name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flywheel_tasks.core import schemas
from flywheel_tasks.herding.files import read_examples, read_preferences
from tests.herding.conftest import source

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def example(name: str, messages: Any = TALK, **more: Any) -> dict[str, Any]:
    return {"example_id": name, "source": "safety", "messages": messages} | more


def preference(name: str, **more: Any) -> dict[str, Any]:
    return {"preference_id": name, "turns": TALK[:1], "chosen": "Ho", "rejected": "No"} | more


def test_every_assistant_turn_is_trained_unless_the_line_says_otherwise(tmp_path: Path) -> None:
    quiet = [TALK[0], TALK[1] | {"trained": False}, TALK[0], TALK[1]]
    marked = "\ufeff" + json.dumps(example("bom", source="capability"))
    lines = [marked, "", example("quiet", quiet)]
    table, refused = read_examples([source(tmp_path, lines)])
    assert table.schema.equals(schemas.EXAMPLE)
    assert refused.num_rows == 0
    bom, quiet_row = table.to_pylist()
    assert (bom["example_id"], bom["source"], bom["user"]) == ("bom", "capability", None)
    assert [m["trained"] for m in quiet_row["messages"]] == [False, False, False, True]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not_json"),
        (example("e", source="reddit"), "breaks_the_contract: Invalid enum value 'reddit'"),
        (example("e", colour="red"), "breaks_the_contract: Object contains unknown field `colour`"),
        (example("e", [TALK[0]]), "nothing_to_train"),
        (example("e", [TALK[0], TALK[1] | {"content": "  "}]), "nothing_to_train"),
        (example("e", [TALK[0] | {"trained": True}, TALK[1]]), "trains_a_turn_that_is_not_the_assistants"),
        (example("first"), "example_id_repeats"),
    ],
)
def test_a_bad_line_is_refused_with_its_file_and_number(tmp_path: Path, line: Any, reason: str) -> None:
    table, refused = read_examples([source(tmp_path, [example("first"), line, example("last")])])
    assert table["example_id"].to_pylist() == ["first", "last"]
    [row] = refused.to_pylist()
    assert row["where"] == "delivered.jsonl:2"
    assert row["reason"].startswith(reason)
    assert row["raw"] is None


def test_an_id_repeats_across_files_too(tmp_path: Path) -> None:
    files = [source(tmp_path, [example("e")], "a.jsonl"), source(tmp_path, [example("e"), example("f")], "b.jsonl")]
    table, refused = read_examples(files)
    assert table["example_id"].to_pylist() == ["e", "f"]
    assert refused.select(["where", "reason"]).to_pylist() == [{"where": "b.jsonl:1", "reason": "example_id_repeats"}]


def test_delivered_preferences_are_internal_pairs_of_nobody(tmp_path: Path) -> None:
    ends = preference("odd", turns=TALK)
    table, refused = read_preferences([source(tmp_path, [preference("p", locale="hi_IN"), ends])])
    [row] = table.to_pylist()
    assert table.schema.equals(schemas.PREFERENCE)
    assert (row["character_id"], row["user"], row["traffic"], row["split"]) == ("none", "", "internal", "train")
    assert (row["locale"], row["chosen"], row["rejected"]) == ("hi_IN", "Ho", "No")
    assert refused["reason"].to_pylist() == ["context_does_not_end_in_a_user_turn"]
