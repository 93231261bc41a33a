"""Candidate against champion: who answered the same prompt, and which answer wins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel_tasks.core import schemas
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.evaluation.versus import match, outcomes, rate_of, without


def completion(
    prompt: str, policy: str, *, finish: str = "stop", sample: int = 0, character: str = "maya"
) -> dict[str, Any]:
    turns = [{"role": "user", "content": prompt}]
    named = {"completion_id": f"{policy}-{prompt}-{sample}", "prompt_id": prompt, "user": f"u-{prompt}"}
    told = {"character_id": character, "sample": sample, "finish": finish, "policy": policy, "turns": turns}
    plain = {"locale": "en_US", "split": "eval", "text": f"{policy} on {prompt}", "tokens": 3, "scores": []}
    return named | told | plain | dict.fromkeys(("language", "jtbd", "logprob", "accepted", "reason"))


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=schemas.COMPLETION)


def prompts(*sources: tuple[str, str]) -> pa.Table:
    return pa.table({"prompt_id": [p for p, _ in sources], "source": [s for _, s in sources]})


def both(prompt: str, **kind: Any) -> list[dict[str, Any]]:
    return [completion(prompt, policy, **kind) for policy in ("champion", "candidate")]


SOURCES = prompts(("p1", "internal"), ("p2", "production"), ("p3", "production"), ("p4", "internal"))


def test_rows_are_paired_by_prompt_and_sample_whatever_their_order() -> None:
    rows = [*both("p1"), *both("p2"), *both("p2", sample=1), completion("p1", "sft")]
    found = match(table(rows[::-1]), SOURCES)
    assert found.rejected.num_rows == 0
    assert found.candidate.column("prompt_id").to_pylist() == found.champion.column("prompt_id").to_pylist()
    assert found.candidate.column("sample").to_pylist() == found.champion.column("sample").to_pylist()
    assert dict(zip(found.candidate.column("prompt_id").to_pylist(), found.source.tolist(), strict=True)) == {
        "p1": "internal",
        "p2": "production",
    }


def test_a_model_that_failed_has_lost_and_two_that_failed_say_nothing() -> None:
    rows = [
        completion("p1", "candidate", finish="error"), completion("p1", "champion"),
        completion("p2", "candidate"), completion("p2", "champion", finish="error"),
        completion("p3", "candidate", finish="error"), completion("p3", "champion", finish="error"),
        completion("p4", "candidate"),
        completion("p9", "candidate"), completion("p9", "champion"),
        completion("p8", "champion"),
    ]  # fmt: skip
    found = match(table(rows), SOURCES)
    assert found.candidate.column("prompt_id").to_pylist() == ["p1", "p2"]
    nothing = np.full(2, np.nan)
    assert outcomes(found, nothing, nothing).tolist() == [0.0, 1.0]
    reasons = dict(
        zip(found.rejected.column("row_id").to_pylist(), found.rejected.column("reason").to_pylist(), strict=True)
    )
    assert reasons == {
        "candidate-p3-0": "both_failed", "champion-p3-0": "both_failed",
        "candidate-p4-0": "no_counterpart", "champion-p8-0": "no_counterpart",
        "candidate-p9-0": "unknown_prompt", "champion-p9-0": "unknown_prompt",
    }  # fmt: skip


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdef"), st.integers(0, 1), st.sampled_from(["candidate", "champion"]),
                  st.sampled_from(["stop", "length", "error"])),
        unique_by=lambda row: row[:3], max_size=20,
    )
)  # fmt: skip
def test_no_response_is_lost(rows: list[tuple[str, int, str, str]]) -> None:
    responses = table([completion(p, policy, finish=finish, sample=sample) for p, sample, policy, finish in rows])
    found = match(responses, prompts(*((p, "internal") for p in "abcd")))
    assert found.candidate.num_rows == found.champion.num_rows == len(found.source)
    assert 2 * found.candidate.num_rows + found.rejected.num_rows == len(rows)
    kept = {*found.candidate.column("completion_id").to_pylist(), *found.champion.column("completion_id").to_pylist()}
    assert kept.isdisjoint(found.rejected.column("row_id").to_pylist())


def test_the_rate_is_of_one_set_and_clustered_by_character() -> None:
    rows = [row for i in range(40) for row in both(f"p{i}", character=f"c{i % 4}")]
    sources = prompts(*((f"p{i}", "internal" if i % 2 else "production") for i in range(40)))
    found = match(table(rows), sources)
    number = np.array([int(p[1:]) for p in found.candidate.column("prompt_id").to_pylist()])
    outcome = outcomes(found, np.where(number % 2, 1.0, 0.0), np.full(40, 0.5))
    internal = rate_of(found, outcome, "internal", alpha=0.05, draws=200, seed=1)
    user = rate_of(found, outcome, "user", alpha=0.05, draws=200, seed=1)
    assert internal is not None
    assert user is not None
    assert (internal.rate, internal.n, internal.clusters) == (1.0, 20, 2)
    assert (user.rate, user.losses) == (0.0, 20)
    assert rate_of(found, np.full(40, np.nan), "user", alpha=0.05, draws=200, seed=1) is None


def test_a_prompt_answered_twice_is_refused() -> None:
    with pytest.raises(InputError, match="repeat a prompt and sample"):
        match(table([*both("p1"), completion("p1", "candidate")]), SOURCES)


def test_a_forgotten_user_is_neither_compared_nor_named() -> None:
    rows = [*both("p1"), *both("p2"), completion("p1", "sft")]
    kept, gone = without(table(rows), frozenset({"u-p1"}))
    assert set(kept.column("prompt_id").to_pylist()) == {"p2"}
    assert gone.column("reason").to_pylist() == ["forgotten"] * 2
    assert gone.column("user").null_count == 2
    assert gone.schema.equals(schemas.QUARANTINE)
    assert without(table(rows), frozenset())[1].num_rows == 0
