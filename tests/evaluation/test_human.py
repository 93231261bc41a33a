"""People's preference between two models in a conversation: sides, ties and repeats (Sec. 2.5.1)."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest

from flywheel_tasks.core import schemas
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.evaluation.human import compare

NEW, OLD = "rl/new", "rl/old"


def pair(number: int, policies: tuple[str, str], character: str = "maya") -> dict[str, Any]:
    fixed = {
        "user": "u",
        "source": "internal",
        "locale": "en",
        "split": "eval",
        "made": "policy_pool",
        "mode": "interactive",
    }
    named = {"pair_id": f"p{number}", "prompt_id": f"c{number // 3}", "character_id": character, "turns": []}
    sides = {"y0": "a", "y1": "b", "policy0": policies[0], "policy1": policies[1]}
    deltas = dict.fromkeys(("delta_length", "delta_emoji", "delta_list", "delta_markdown"), 0)
    return fixed | named | sides | deltas


def vote(number: int, preferred: str, annotator: str = "ann") -> dict[str, Any]:
    named = {
        "annotation_id": f"{number}-{annotator}",
        "pair_id": f"p{number}",
        "annotator": annotator,
        "mode": "interactive",
    }
    return named | {"preferred": preferred, "user": "u", "batch": "261120", "at": datetime(2026, 11, 20, tzinfo=UTC)}


def table(rows: list[dict[str, Any]], schema: str) -> pa.Table:
    fields = schemas.get(schema)
    return pa.Table.from_pylist([dict.fromkeys(fields.names) | row for row in rows], schema=fields)


def run(votes: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> Any:
    return compare(table(votes, "annotation"), table(pairs, "pair"), NEW, OLD, draws=300)


def test_the_side_a_model_was_shown_on_does_not_matter() -> None:
    pairs = [pair(0, (NEW, OLD), "a"), pair(1, (OLD, NEW), "b"), pair(2, (OLD, NEW), "c"), pair(3, (NEW, OLD), "d")]
    found = run([vote(0, "y0"), vote(1, "y1"), vote(2, "y0"), vote(3, "tie")], pairs)
    assert (found.rate.rate, found.rate.n) == (0.625, 4)
    assert (found.rate.wins, found.rate.ties, found.rate.losses) == (2, 1, 1)
    mirrored = run([vote(0, "y1"), vote(1, "y0"), vote(2, "y1"), vote(3, "neither")], pairs)
    assert mirrored.rate.rate == 1 - found.rate.rate


def test_a_turn_that_many_looked_at_counts_once() -> None:
    pairs = [pair(0, (NEW, OLD), "a"), pair(1, (NEW, OLD), "b")]
    crowd = [vote(0, "y0", f"a{i}") for i in range(5)] + [vote(0, "y1", "a9")]
    found = run([*crowd, vote(1, "y1")], pairs)
    assert (found.rate.rate, found.rate.n, found.annotators, found.conversations) == (0.5, 2, 7, 1)
    split = run([vote(0, "y0", "x"), vote(0, "y1", "y")], pairs)
    assert split.rate.ties == 1


def test_what_is_not_of_this_comparison_is_left_out_and_counted() -> None:
    pairs = [pair(0, (NEW, OLD)), pair(1, (NEW, "rl/other")), pair(2, (NEW, NEW))]
    votes = [vote(0, "y0"), vote(1, "y0"), vote(2, "y0"), vote(9, "y0")]
    found = run(votes, pairs)
    assert found.rate.n == 1
    assert found.left_out == {"unknown_pair": 1, "another_pair_of_models": 2}
    assert len(votes) == found.rate.n + sum(found.left_out.values())
    assert run([], pairs).rate is None


def test_an_answer_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="preferred 'left'"):
        run([vote(0, "left")], [pair(0, (NEW, OLD))])
