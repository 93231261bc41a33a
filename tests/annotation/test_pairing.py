from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel_tasks.annotation import pairing
from flywheel_tasks.annotation.pairing import Bounds, Made
from tests.annotation import worlds

WIDE = Bounds(words=500, emoji=50, list_items=50, markdown=50)


def assembled(a: Made, b: Made, bounds: Bounds = WIDE, mode: str = "static") -> tuple[dict[str, object], str | None]:
    planned = worlds.plan(worlds.prompts(1), {mode: 1.0})
    table, reasons = pairing.assemble(planned, [a], [b], bounds)
    return table.to_pylist()[0], reasons[0].as_py()


def test_a_plan_draws_whom_and_how_from_ids_alone() -> None:
    table = worlds.prompts(400)
    settings = {"count": 200, "pool": 3, "kinds": ("warmer", "plain"), "rewrite_share": 0.4,
                "modes": {"static": 0.5, "interactive": 0.5}, "seed": 5}  # fmt: skip
    planned = pairing.plan(table, {}, **settings)
    shuffled = pairing.plan(table.take(pa.array(np.random.default_rng(0).permutation(400))), {}, **settings)
    assert len(planned.prompts) == 200
    chosen = set(planned.prompts["prompt_id"].to_pylist())
    assert chosen == set(shuffled.prompts["prompt_id"].to_pylist())
    assert chosen != set(pairing.plan(table, {}, **{**settings, "seed": 6}).prompts["prompt_id"].to_pylist())
    assert 0.3 < np.mean([kind is not None for kind in planned.kind]) < 0.5
    assert 0.4 < np.mean(planned.mode == "interactive") < 0.6
    assert 0.4 < planned.swap.mean() < 0.6
    assert (planned.first != planned.second).all(), "two policies of a pool, never the same twice"
    assert set(planned.first.tolist()) == set(planned.second.tolist()) == {0, 1, 2}


def test_sessions_that_go_on_come_before_fresh_prompts_and_keep_their_mode() -> None:
    sessions = {"interactive": worlds.prompts(3, seed=1), "steerability": worlds.prompts(2, seed=2)}
    planned = pairing.plan(
        worlds.prompts(20), sessions, count=8, pool=1, kinds=(), rewrite_share=0.0, modes={"static": 1.0}, seed=1
    )
    assert planned.mode.tolist() == ["interactive"] * 3 + ["steerability"] * 2 + ["static"] * 3
    assert (planned.first == planned.second).all(), "a pool of one policy is sampled twice"


def test_which_response_came_first_is_hidden_by_a_coin() -> None:
    planned = worlds.plan(worlds.prompts(300))
    firsts, seconds = ([Made(f"{name} {i}", name) for i in range(300)] for name in ("one", "two"))
    table, _ = pairing.assemble(planned, firsts, seconds, WIDE)
    assert 110 < table["policy0"].to_pylist().count("one") < 190
    for row in table.to_pylist():
        assert {row["policy0"], row["policy1"]} == {"one", "two"}
        assert row["y0"].startswith(row["policy0"])
        assert row["y1"].startswith(row["policy1"])


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (Made("The lamp is lit.", "a"), Made("the  LAMP is lit.", "b"), "identical"),
        (Made("", "a"), Made("The lamp", "b"), "empty"),
        (Made("call me at +1 212 555 0148", "a"), Made("call me at home tonight", "b"), "identifier"),
        (Made("The lamp", "a", "unfinished"), Made("The lamp", "b"), "unfinished"),
        (Made("The lamp", "a"), Made("", "b", "rewrite_twice"), "rewrite_twice"),
        (Made("The lamp is lit.", "a"), Made("The lamp is out.", "b"), None),
    ],
)
def test_a_pair_that_is_no_pair_is_dropped_with_its_reason(first: Made, second: Made, reason: str | None) -> None:
    assert assembled(first, second)[1] == reason


@pytest.mark.parametrize(
    ("first", "second", "bounds", "reason"),
    [
        ("sea " * 30, "sea " * 16 + "gull", Bounds(words=12, words_share=0.35), "delta_length"),
        ("sea " * 30, "sea " * 21 + "gull", Bounds(words=5, words_share=0.35), None),
        ("sea gull", "sea " * 13, Bounds(words=12), None),
        ("hi 😀😀😀", "hi there", Bounds(emoji=2), "delta_emoji"),
        ("hi 😀😀", "hi there", Bounds(emoji=2), None),
        ("- a\n- b\n- c", "a b c", Bounds(list_items=2), "delta_list"),
        ("**a** **b** `c`", "a b c", Bounds(markdown=2), "delta_markdown"),
    ],
)
def test_style_differences_are_bounded(first: str, second: str, bounds: Bounds, reason: str | None) -> None:
    row, found = assembled(Made(first, "a"), Made(second, "b"), bounds)
    assert found == reason
    mirrored, other = assembled(Made(second, "a"), Made(first, "b"), bounds)
    assert other == reason
    assert row["delta_length"] == -mirrored["delta_length"]  # type: ignore[operator]


@given(st.lists(st.tuples(st.integers(-40, 40), st.integers(0, 80)), min_size=1, max_size=20), st.integers(0, 30))
def test_whatever_passes_lies_within_every_bound(rows: list[tuple[int, int]], words: int) -> None:
    bounds = Bounds(words=words, words_share=0.2)
    length = np.array([delta for delta, _ in rows])
    longer = np.array([max(abs(delta), size) for delta, size in rows])
    deltas = {"delta_length": length, **{name: np.zeros(len(rows), int) for name in list(pairing.DELTAS)[1:]}}
    for reason, delta, size in zip(pairing.too_different(deltas, longer, bounds), length, longer, strict=True):
        assert (reason is None) == (abs(delta) <= max(words, 0.2 * size))


def test_a_tool_call_makes_an_image_pair() -> None:
    call = '{"arguments": {"prompt": "a gull"}, "name": "image"}'
    row, reason = assembled(Made("Look!", "a", None, call), Made("Look here, a gull", "b"))
    assert (row["mode"], reason) == ("image", None)
    assert {row["tool_call0"], row["tool_call1"]} == {call, None}
    silent, reason = assembled(Made("", "a", None, call), Made("Look here, a gull", "b"))
    assert reason is None, "an image without words is a response"
    assert silent["mode"] == "image"


def test_the_same_pair_has_the_same_id_in_every_cycle() -> None:
    one, _ = assembled(Made("The lamp is lit.", "a"), Made("The lamp is out.", "b"))
    again, _ = assembled(Made("The lamp is lit.", "renamed"), Made("The lamp is out.", "b"))
    other, _ = assembled(Made("The lamp is lit!", "a"), Made("The lamp is out.", "b"))
    assert one["pair_id"] == again["pair_id"] != other["pair_id"]
