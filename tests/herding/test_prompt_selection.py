"""Prompts for RL: near the policy, clean, and those on which the responses differ most (Sec. 3.5.2, 3.5.4, 3.5.6)."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel_tasks.core import schemas
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.herding.prompt_selection import Candidates, Selected, SelectionConfig, candidates, held_out, select
from flywheel_tasks.herding.reward import Rewards
from tests.herding.rl_tables import completions, prompts, turns
from tests.wide import ROWS, wide

K = 4


def answered(found: Candidates, values: dict[str, list[float]], total: Any = None) -> tuple[pa.Table, Rewards]:
    """k responses to each prompt of `values` with these scores, which are their rewards too unless `total` is given."""
    ids = found.prompts["prompt_id"].to_pylist()
    rows = [{"prompt_id": name, "sample": n} for name in ids for n in range(len(values.get(name, [])))]
    scores, rewards = (
        np.array([value for name in ids for value in given.get(name, [])], float) for given in (values, total or values)
    )
    return completions(rows), Rewards(rewards, {"preference": scores})


def selected(rows: list[dict[str, Any]], values: list[list[float]], **config: Any) -> Selected:
    settings = SelectionConfig(**config)
    found = candidates(prompts(rows), (), settings, seed=0)
    return select(found, *answered(found, {f"p{i}": v for i, v in enumerate(values)}), settings)


def reasons(table: pa.Table) -> dict[str, str]:
    return dict(zip(table["row_id"].to_pylist(), table["reason"].to_pylist(), strict=True))


def test_prompts_on_which_the_responses_differ_most_come_first() -> None:
    found = selected([{}] * 4, [[0, 1, 0, 1], [0, 9, 0, 9], [5, 5, 5, 5], [0, 3, 0, 3]], share=0.7)
    assert found.prompts["prompt_id"].to_pylist() == ["p1", "p3"]
    assert reasons(found.rejected) == {"p0": "not_hard", "p2": "no_variance"}
    assert found.prompts.schema == schemas.PROMPT


@pytest.mark.parametrize("by", ["variance", "mean"])
def test_the_preference_model_ranks_and_penalties_only_leave_out_what_teaches_nothing(by: str) -> None:
    """p0 has the widest rewards, because half its responses ran into the limit; p2's penalties make up for its scores;
    p3's responses score alike, but one failed."""
    found = candidates(prompts([{}] * 4), (), SelectionConfig(), seed=0)
    scores: dict[str, list[float]] = {"p0": [5, 6], "p1": [0, 4], "p2": [-9, 9], "p3": [7, 7]}
    total: dict[str, list[float]] = {"p0": [5, -90], "p1": [0, 4], "p2": [-9, -9], "p3": [7, 5]}
    config = SelectionConfig.model_validate({"by": by, "share": 1.0})
    chosen = select(found, *answered(found, scores, total), config)
    assert chosen.prompts["prompt_id"].to_pylist() == ["p1", "p0", "p3"]
    assert reasons(chosen.rejected) == {"p2": "no_variance"}
    assert chosen.report["variance"]["usable"][-1] == 8


def test_what_may_not_be_learned_from_is_refused_with_its_reason() -> None:
    """Held out, another version's, of a forgotten user, with a history that the linter drops; k of 1, no answer."""
    refusal = turns("Hi", "I'm sorry, but I can't assist with that.", "Why?")
    found = candidates(
        prompts([{}, {"split": "eval"}, {"near_policy": False}, {"user": "gone"}, {"turns": refusal},
                 {"near_policy": False, "source": "internal"}, {}, {}]),
        {"gone"}, SelectionConfig(), seed=0,
    )  # fmt: skip
    table, rewards = answered(found, {"p0": [1, 2], "p5": [1], "p6": [np.nan, np.nan]})
    chosen = select(found, table, rewards, SelectionConfig())
    assert chosen.prompts["prompt_id"].to_pylist() == ["p0"]
    told = reasons(chosen.rejected)
    assert told.pop("p4").startswith("style_")
    assert told == {
        "p2": "older_version",
        "p3": "forgotten",
        "p5": "one_score",
        "p6": "no_response",
        "p7": "no_response",
    }
    assert found.rows_in == 7
    assert chosen.rejected.filter(pa.array([r == "p3" for r in chosen.rejected["row_id"].to_pylist()]))[
        "user"
    ].null_count


def test_prompts_of_older_versions_are_used_when_the_config_says_so() -> None:
    rows = [{"near_policy": False, "model_version": "v0"}] * 2
    with pytest.raises(InputError, match=r"2 of other model versions \(selection\.older_versions\)"):
        candidates(prompts(rows), (), SelectionConfig(), seed=0)
    assert candidates(prompts(rows), (), SelectionConfig(older_versions=True), seed=0).prompts.num_rows == 2


def test_the_policy_is_not_shown_the_style_that_it_shall_not_learn() -> None:
    """Sec. 3.5.6: assistant turns of the history are cleaned before the responses are drawn; users' turns are not."""
    said = turns("OMG hi!!! 😀😀😀😀😀", "OMG, that's so cool! 😂😂😂😂😂 Tell me **more.", "lol ok")
    found = candidates(prompts([{"turns": said}]), (), SelectionConfig(), seed=0)
    user, assistant, again = (turn["content"] for turn in found.prompts["turns"].to_pylist()[0])
    assert (user, again) == (said[0]["content"], said[2]["content"])
    assert "OMG" not in assistant
    assert assistant.count("😂") <= 3
    assert "**" not in assistant
    assert {(rule, what) for rule, what, _ in found.style} >= {
        ("overused_phrase", "repaired"),
        ("emoji_excess", "repaired"),
    }


def crowd(seed: int = 0, count: int = 600) -> tuple[list[dict[str, Any]], list[list[float]]]:
    """Long role-play scores lower throughout, as in Sec. 3.5.4; how hard a prompt is has nothing to do with its job."""
    rng = np.random.default_rng(seed)
    jobs = rng.choice(
        ["small_talk", "information", "role_play_adventure", "role_play_romantic"], count, p=[0.5, 0.3, 0.1, 0.1]
    )
    rows = [{"jtbd": str(job), "depth": "long" if job.startswith("role") else "short"} for job in jobs]
    shift = np.where(np.char.startswith(jobs, "role"), -1.2, 0.0)[:, None] + rng.normal(0, 0.5, (count, 1))
    spread = rng.gamma(4.0, 0.1, (count, 1))
    return rows, (shift + spread * rng.normal(size=(count, 8))).tolist()


def test_the_mean_over_represents_role_play_and_the_report_shows_it() -> None:
    rows, values = crowd()
    by = {name: selected(rows, values, by=name, share=0.2).report for name in ("variance", "mean")}
    for job in ("role_play_adventure", "role_play_romantic"):
        assert by["mean"]["distributions"]["jtbd"][job]["ratio"] > 3
        assert by["variance"]["distributions"]["jtbd"][job]["ratio"] < 1.5
        assert by["variance"]["distributions_by_mean"]["jtbd"][job] == by["mean"]["distributions"]["jtbd"][job]
    assert by["mean"]["distributions"]["depth"]["long"]["ratio"] > 3
    assert by["variance"]["distributions"]["depth"]["long"]["ratio"] < 1.5
    for report in by.values():
        for dimension in report["distributions"].values():
            assert sum(row["before"] for row in dimension.values()) == pytest.approx(1)
            assert sum(row["after"] for row in dimension.values()) == pytest.approx(1)
    assert by["variance"]["variance"]["selected"][0] >= by["variance"]["variance"]["usable"][3]
    json.dumps(by, allow_nan=False)


row = st.fixed_dictionaries(
    {
        "split": st.sampled_from(["train", "train", "eval"]),
        "near_policy": st.booleans(),
        "source": st.sampled_from(["production", "internal"]),
        "user": st.sampled_from(["u0", "u1", "gone"]),
        "jtbd": st.sampled_from([None, "a", "b"]),
        "turns": st.sampled_from(
            [
                turns("Hi"),
                turns("Hi", "OMG lol", "So?"),
                turns("Hi", "I'm sorry, but I can't assist with that.", "Why?"),
            ]
        ),
    }
)
rewards = st.lists(st.sampled_from([0.0, 1.0, -2.5, float("nan")]), min_size=0, max_size=3)


@given(
    st.lists(st.tuples(row, rewards), min_size=1, max_size=12),
    st.sampled_from(["variance", "mean"]),
    st.floats(0.1, 1),
    st.sampled_from([None, 1, 3]),
    st.sampled_from([None, 2, 5]),
    st.booleans(),
)
def test_no_refused_prompt_is_selected_and_every_prompt_is_accounted_for(
    world: list[tuple[dict[str, Any], list[float]]],
    by: str,
    share: float,
    most: int | None,
    some: int | None,
    older: bool,
) -> None:
    table = prompts([row for row, _ in world])
    config = SelectionConfig.model_validate(
        {"by": by, "share": share, "most": most, "candidates": some, "older_versions": older}
    )
    values = {f"p{i}": given for i, (_, given) in enumerate(world)}
    try:
        found = candidates(table, {"gone"}, config, seed=3)
        chosen = select(found, *answered(found, values), config)
    except InputError:
        return
    rows = {r["prompt_id"]: r for r in table.to_pylist()}
    names, lost = chosen.prompts["prompt_id"].to_pylist(), chosen.rejected["row_id"].to_pylist()
    train = {name for name, r in rows.items() if r["split"] == "train"}
    assert Counter(names + lost) == Counter(train)
    assert chosen.prompts.num_rows + chosen.rejected.num_rows == found.rows_in
    assert sum(chosen.report["refused"].values()) == len(lost)
    assert len(names) <= (most or len(names))
    for name in names:
        assert rows[name]["user"] != "gone"
        assert older or rows[name]["near_policy"] or rows[name]["source"] == "internal"
        assert len({value for value in values[name] if value == value}) > 1
    spread = {name: np.nanvar(values[name], ddof=1) for name in names}
    kept = [spread[name] if by == "variance" else -np.nanmean(values[name]) for name in names]
    assert kept == sorted(kept, reverse=True)
    passed_over = [n for n, reason in reasons(chosen.rejected).items() if reason == "not_hard"]
    if by == "variance":
        assert all(np.nanvar(values[name], ddof=1) <= min(kept) + 1e-12 for name in passed_over)


def test_nothing_to_tell_responses_apart_stops_the_run_and_says_why() -> None:
    with pytest.raises(InputError, match=r"no_variance \(1\), one_score \(1\)"):
        selected([{}, {}], [[1, 1], [2]])


def test_the_same_prompts_are_scored_whatever_their_order_and_no_more_than_asked() -> None:
    rows = [{"prompt_id": f"x{i}"} for i in range(40)]
    config = SelectionConfig(candidates=10)
    a = candidates(prompts(rows), (), config, seed=1)
    b = candidates(prompts(rows[::-1]), (), config, seed=1)
    assert sorted(a.prompts["prompt_id"].to_pylist()) == sorted(b.prompts["prompt_id"].to_pylist())
    assert (a.prompts.num_rows, a.rejected.num_rows) == (10, 30)
    assert set(a.rejected["reason"].to_pylist()) == {"not_drawn"}
    assert (
        a.prompts["prompt_id"].to_pylist()
        != candidates(prompts(rows), (), config, seed=2).prompts["prompt_id"].to_pylist()
    )


def test_held_out_prompts_are_never_trained_on_and_keep_their_histories() -> None:
    said = turns("Hi", "OMG lol 😂😂😂😂😂", "So?")
    rows: list[dict[str, Any]] = [
        {"prompt_id": f"x{i}", "split": "eval" if i % 2 else "train", "turns": said} for i in range(20)
    ]
    rows += [{"split": "eval", "near_policy": False}, {"split": "eval", "user": "gone"}]
    config = SelectionConfig()
    outside, of = held_out(prompts(rows), {"gone"}, config, most=100)
    assert of == outside.num_rows == 10
    assert held_out(prompts(rows), {"gone"}, config, most=3)[1] == 10
    inside = candidates(prompts(rows), {"gone"}, config, seed=0).prompts
    assert set(outside["prompt_id"].to_pylist()) == {f"x{i}" for i in range(1, 20, 2)}
    assert not set(outside["prompt_id"].to_pylist()) & set(inside["prompt_id"].to_pylist())
    assert outside["turns"].to_pylist()[0] == said
    with pytest.raises(InputError, match="guardrails need some"):
        held_out(prompts([{}]), (), config, most=5)


def test_the_guardrails_leave_the_gates_own_prompts_alone_while_there_are_enough() -> None:
    from flywheel_tasks.evaluation.respond import _chosen

    table = prompts([{"prompt_id": f"x{i}", "split": "eval"} for i in range(40)])
    gate = _chosen(table, 20)["prompt_id"].to_pylist()
    guard = held_out(table, (), SelectionConfig(), most=20)[0]["prompt_id"].to_pylist()
    assert len(guard) == len(gate) == 20
    assert not set(gate) & set(guard)


def test_rewards_of_other_responses_are_refused() -> None:
    found = candidates(prompts([{}]), (), SelectionConfig(), seed=0)
    with pytest.raises(InputError, match="2 responses, but 3 rewards"):
        select(found, completions([{}, {}]), Rewards(np.zeros(3), {"preference": np.zeros(3)}), SelectionConfig())


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "eval"])
def test_few_of_prompts_with_more_text_than_arrow_can_join(split: str) -> None:
    table = wide(prompts([{"split": split}] * ROWS), "turns")
    if split == "train":
        found = candidates(table, (), SelectionConfig(candidates=2), seed=0)
        assert (found.prompts.num_rows, found.rejected.num_rows) == (2, ROWS - 2)
    else:
        chosen, of = held_out(table, (), SelectionConfig(), most=2)
        assert (chosen.num_rows, of) == (2, ROWS)


def test_the_choice_of_prompts_does_not_depend_on_the_chunks_of_their_table() -> None:
    whole = prompts([{"split": "eval" if i % 3 else "train"} for i in range(60)])
    pieces = pa.concat_tables([whole.slice(first, 7) for first in range(0, 60, 7)])
    config = SelectionConfig(candidates=8)
    a, b = (candidates(table, (), config, seed=3) for table in (whole, pieces))
    assert a.prompts.equals(b.prompts)
    assert a.rejected.equals(b.rejected)
    assert held_out(whole, (), config, most=9)[0].equals(held_out(pieces, (), config, most=9)[0])
