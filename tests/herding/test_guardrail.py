"""Guardrails: what a policy has become beside its start, and that a run ends before its judges mislead it (V12)."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flywheel_tasks.core.errors import FlywheelError, InputError
from flywheel_tasks.herding import guardrail
from flywheel_tasks.herding.guardrail import GuardrailConfig, Level, measure, nearest, of_metrics, verdict
from tests.herding.rl_tables import completions

CONFIG = GuardrailConfig()
ORDER = ("lost", "go", "soft", "hard")
rate = st.floats(0, 1)


def said(texts: list[str], **more: Any) -> pa.Table:
    rows = [{"prompt_id": f"p{i}", "character_id": f"c{i % 7}", "text": text} | more for i, text in enumerate(texts)]
    return completions(rows)


def emoji(table: pa.Table) -> np.ndarray:
    return np.array([text.count("😀") for text in table["text"].to_pylist()], float)


def level(step: int, *rates: float, half: float = 0.5) -> Level:
    """A measurement whose intervals reach `half` beyond its win-rates."""
    judged = dict(zip(("pointwise", "pairwise"), rates, strict=False))
    return Level(step, judged, {judge: min(rate + half, 1.0) for judge, rate in judged.items()})


# -- measures


def test_win_rates_by_both_judges_with_ties_half() -> None:
    now, start = said(["a"] * 8), said(["b"] * 8)
    points = np.array([1, 1, 1, 0, 0, 5, 5, 5.0]), np.array([0, 0, 0, 0, 0, 9, 9, 9.0])
    pair = np.array([0.9, 0.9, 0.9, 0.9, 0.5, 0.5, 0.1, 0.1])
    found = measure(20, now, start, pointwise=points, pairwise=pair, config=CONFIG, kl=0.02, entropy=1.5)
    assert found.rates == {"pointwise": 0.5, "pairwise": 0.625}
    assert found.pointwise is not None
    assert (found.pointwise.wins, found.pointwise.ties, found.pointwise.losses) == (3, 2, 3)
    metrics = found.metrics()
    assert metrics["guard/win_rate"] == 0.625
    assert metrics["guard/win_rate_pointwise_low"] <= 0.5 <= metrics["guard/win_rate_pointwise_high"]
    assert (metrics["guard/kl"], metrics["guard/entropy"]) == (0.02, 1.5)
    assert of_metrics(20, json.loads(json.dumps(metrics))) == Level(20, found.rates, found.highs)
    assert of_metrics(21, {"loss": 1.0}) is None


def test_a_policy_that_fails_to_answer_loses_and_unknown_rows_say_nothing() -> None:
    now = completions(
        [{"prompt_id": f"p{i}", "finish": finish} for i, finish in enumerate(["error", "stop", "error", "stop"])]
    )
    start = completions(
        [{"prompt_id": f"p{i}", "finish": finish} for i, finish in enumerate(["stop", "error", "error", "stop"])]
    )
    points = np.array([np.nan, 1, np.nan, np.nan]), np.array([1, np.nan, np.nan, 1])
    found = measure(1, now, start, pointwise=points, pairwise=None, config=GuardrailConfig(coverage=0.5))
    assert found.pointwise is not None
    assert (found.pointwise.wins, found.pointwise.losses, found.pointwise.n) == (1, 1, 2)
    assert found.pairwise is None


def test_style_of_both_policies_is_measured_on_what_they_said() -> None:
    now = completions(
        [
            {"prompt_id": "p0", "text": "Hi 😀", "tokens": 10},
            {"prompt_id": "p1", "text": "- a\n- b", "tokens": 30, "finish": "length"},
            {"prompt_id": "p2", "text": "", "tokens": 0, "finish": "error"},
        ]
    )
    start = completions([{"prompt_id": f"p{i}", "text": "Hi.", "tokens": 4} for i in range(3)])
    metrics = measure(5, now, start, pointwise=(np.ones(3), np.zeros(3)), pairwise=None, config=CONFIG).metrics()
    assert {name: metrics[f"guard/{name}"] for name in ("tokens", "emoji", "lists", "unfinished")} == {
        "tokens": 20, "emoji": 0.5, "lists": 0.5, "unfinished": 0.5
    }  # fmt: skip
    assert {metrics[f"guard/start_{name}"] for name in ("emoji", "lists", "unfinished")} == {0}
    assert metrics["guard/start_tokens"] == 4


def test_the_divergence_is_per_token_of_the_current_policy() -> None:
    """Against the closed form: two tokens a response, each drawn from (0.8, 0.2) where the start had (0.5, 0.5)."""
    rng = np.random.default_rng(0)
    first = rng.random((20_000, 2)) < 0.8
    own = np.where(first, math.log(0.8), math.log(0.2)).sum(axis=1)
    table = pa.table({"logprob": [*own, None], "tokens": [*[2] * 20_000, 2], "finish": ["stop"] * 20_001})
    kl = guardrail.mean_kl(table, np.array([*[2 * math.log(0.5)] * 20_000, 0.0]))
    assert kl == pytest.approx(0.8 * math.log(1.6) + 0.2 * math.log(0.4), abs=0.01)
    same = said(["a", "b"], logprob=-3.0)
    assert guardrail.mean_kl(same, np.array([-3.0, -3.0])) == 0
    with pytest.raises(InputError, match="divergence is unknown"):
        guardrail.mean_kl(same, np.array([np.nan, np.nan]))


def test_responses_to_other_prompts_and_no_judge_are_refused() -> None:
    with pytest.raises(InputError, match="not to the same prompts"):
        measure(1, said(["a", "b"]), said(["a"]), pointwise=None, pairwise=np.ones(2), config=CONFIG)
    with pytest.raises(InputError, match="no judge"):
        measure(1, said(["a"]), said(["a"]), pointwise=None, pairwise=None, config=CONFIG)


def test_what_no_judge_could_read_is_a_hard_stop() -> None:
    nan = np.full(3, np.nan)
    found = measure(7, said(["a"] * 3), said(["b"] * 3), pointwise=(nan, nan), pairwise=None, config=CONFIG)
    assert verdict(found, CONFIG).level == "hard"
    assert "guard/win_rate" not in found.metrics()
    assert verdict(level(7, 0.5, math.nan), CONFIG).level == "hard"


@pytest.mark.parametrize("blind", ["pointwise", "pairwise"])
def test_a_judge_that_was_given_and_read_nothing_is_not_an_absent_one(blind: str) -> None:
    """The other one saw a policy that is no better: without the blind one the run would go on."""
    nan, equal = np.full(3, np.nan), np.full(3, 0.5)
    points, pair = (nan, equal) if blind == "pointwise" else (equal, nan)
    now, start = said(["a"] * 3), said(["b"] * 3)
    found = measure(7, now, start, pointwise=(points, points), pairwise=pair, config=CONFIG)
    logged = found.metrics()
    assert {name: logged[f"guard/n_{name}"] for name in found.rates} == {"pointwise": 3, "pairwise": 3} | {blind: 0}
    assert "guard/win_rate" not in logged
    again = of_metrics(7, json.loads(json.dumps(logged)))
    assert again is not None
    for seen in (found, again):
        assert verdict(seen, CONFIG).level == "hard"
        assert f"{blind} compared less than 90% of the prompts" in verdict(seen, CONFIG).reason
        assert guardrail.trusted([seen, level(8, 0.55)], [7, 8], CONFIG) == {8: 0.55}


@pytest.mark.parametrize(("read", "expected"), [(1, "hard"), (35, "hard"), (36, "go"), (40, "go")])
def test_a_judge_that_could_not_read_most_responses_is_not_believed(read: int, expected: str) -> None:
    """A policy that learned to write what one judge can't read whole: of the rest, that judge sees it no better than at
    the start. Nor is it believed after a resume, from what was logged."""
    now, start = said(["a"] * 40), said(["b"] * 40)
    points = np.where(np.arange(40) < read, 0.0, np.nan), np.zeros(40)
    found = measure(7, now, start, pointwise=points, pairwise=np.full(40, 0.5), config=CONFIG)
    logged = found.metrics()
    assert (logged["guard/prompts"], logged["guard/n_pointwise"], logged["guard/n_pairwise"]) == (40, read, 40)
    assert ("guard/win_rate" in logged) == (expected == "go")
    again = of_metrics(7, json.loads(json.dumps(logged)))
    assert again is not None
    for seen in (found, again):
        assert verdict(seen, CONFIG).level == expected
        assert guardrail.trusted([seen], [7], CONFIG) == ({7: 0.5} if expected == "go" else {})


# -- decisions


@given(rate, rate, rate, rate, st.floats(0, 0.5))
def test_more_wins_never_lower_a_verdict(a: float, b: float, more_a: float, more_b: float, half: float) -> None:
    low = verdict(level(1, min(a, more_a), min(b, more_b), half=half), CONFIG).level
    high = verdict(level(1, max(a, more_a), max(b, more_b), half=half), CONFIG).level
    assert ORDER.index(low) <= ORDER.index(high)


@given(rate, rate, st.floats(0, 0.5))
def test_the_judge_that_is_won_over_decides(a: float, b: float, half: float) -> None:
    assert verdict(level(1, a, b, half=half), CONFIG).level == verdict(level(1, max(a, b), half=half), CONFIG).level


@pytest.mark.parametrize(
    ("rates", "half", "expected"),
    [((0.21, 0.12), 0.06, "lost"), ((0.05, 0.08), 0.05, "lost"), ((0.44, 0.40), 0.06, "go"),
     ((0.44, 0.40), 0.05, "lost"), ((0.52, 0.20), 0.06, "go"), ((0.30, 0.30), 0.25, "go")],
)  # fmt: skip
def test_a_policy_that_every_judge_is_sure_is_worse_ends_the_run(
    rates: tuple[float, ...], half: float, expected: str
) -> None:
    found = verdict(level(30, *rates, half=half), CONFIG)
    assert found.level == expected
    assert "step 30" in found.reason
    assert "\n" not in found.reason


def test_a_certain_loss_is_measured_logged_and_read_again() -> None:
    now, start = said(["a"] * 70), said(["b"] * 70)
    worse = np.arange(70) % 10 < 1
    found = measure(5, now, start, pointwise=(worse * 2.0, np.ones(70)), pairwise=np.full(70, 0.1), config=CONFIG)
    again = of_metrics(5, json.loads(json.dumps(found.metrics())))
    assert again is not None
    assert verdict(found, CONFIG) == verdict(again, CONFIG)
    assert verdict(found, CONFIG).level == "lost"


def test_a_checkpoint_that_certainly_lost_is_never_handed_out() -> None:
    lost = [level(10, 0.21, 0.12, half=0.06), level(20, 0.05, 0.08, half=0.05)]
    with pytest.raises(FlywheelError, match=r"steps 10, 20 certainly lost to the start.*rl\.train\.learning_rate"):
        nearest(lost, [10, 20], CONFIG)
    assert nearest([level(5, 0.47, half=0.06), *lost], [5, 10, 20], CONFIG) == 5
    assert guardrail.trusted([level(5, 0.47, half=0.06), *lost], [5, 10, 20], CONFIG) == {5: 0.47}


@pytest.mark.parametrize(
    ("rates", "expected"),
    [((0.5, 0.5), "go"), ((0.5999, 0.4), "go"), ((0.6, 0.4), "soft"), ((0.5, 0.6499), "soft"), ((0.65, 0.5), "hard"),
     ((0.4375, 0.7069), "hard")],
)  # fmt: skip
def test_the_ideal_ends_a_run_softly_and_sixty_five_hard(rates: tuple[float, ...], expected: str) -> None:
    """The last is V12: 70.7 % by one reward model, 43.7 % by the other."""
    found = verdict(level(30, *rates), CONFIG)
    assert found.level == expected
    assert f"step {30}" in found.reason
    assert "\n" not in found.reason


@given(st.dictionaries(st.integers(1, 200), rate, min_size=1, max_size=12), st.data())
def test_the_output_is_the_published_checkpoint_nearest_to_the_ideal(
    rates: dict[int, float], data: st.DataObject
) -> None:
    published = data.draw(st.lists(st.sampled_from(sorted(rates)), unique=True))
    guards = [level(step, found) for step, found in rates.items()]
    safe = [step for step in published if rates[step] < CONFIG.hard]
    if not safe:
        with pytest.raises(FlywheelError, match="below the hard limit"):
            nearest(guards, published, CONFIG)
        return
    chosen = nearest(guards, published, CONFIG)
    assert chosen in safe
    assert all(abs(rates[chosen] - CONFIG.ideal) <= abs(rates[step] - CONFIG.ideal) + 1e-9 for step in safe)


def test_of_two_equally_near_the_one_of_fewer_steps_is_taken_and_an_unmeasured_one_never() -> None:
    guards = [level(10, 0.58), level(20, 0.62), level(30, 0.64)]
    assert nearest(guards, [10, 20, 30, 40], CONFIG) == 10
    assert nearest(guards, [20, 30, 40], CONFIG) == 20
    with pytest.raises(FlywheelError, match=r"steps 40"):
        nearest(guards, [40], CONFIG)
    with pytest.raises(FlywheelError, match=r"steps 50 had a judge that compared less than 90%.*guardrail\.coverage"):
        nearest([level(50, 0.5, math.nan)], [50], CONFIG)


@given(st.floats(0.51, 0.99), st.floats(0.51, 0.99))
def test_an_ideal_beyond_the_hard_limit_is_refused(ideal: float, hard: float) -> None:
    assume(ideal >= hard)
    with pytest.raises(ValueError, match="must be below"):
        GuardrailConfig(ideal=ideal, hard=hard)


def test_a_policy_that_learns_to_please_an_emoji_counter_is_stopped_before_it_is_past_the_limit() -> None:
    """A judge that counts emoji, a policy that puts one into a growing share of its responses (Sec. 3.5.6): the run
    ends at the ideal, the output lies there, and the style metrics say what happened."""
    prompts, steps = 400, range(10, 210, 10)
    start = said(["Sure."] * prompts)
    guards = []
    for step in steps:
        now = said(["Sure. 😀" if i % 100 < step // 4 else "Sure." for i in range(prompts)])
        points = emoji(now), emoji(start)
        guards.append(measure(step, now, start, pointwise=points, pairwise=np.full(prompts, 0.5), config=CONFIG))
        if verdict(guards[-1], CONFIG).level != "go":
            break
    assert verdict(guards[-1], CONFIG).level == "soft"
    assert guards[-1].step < max(steps)
    out = nearest(guards, [found.step for found in guards], CONFIG)
    chosen = next(found for found in guards if found.step == out)
    assert chosen.rates["pointwise"] == pytest.approx(CONFIG.ideal, abs=0.02)
    assert chosen.now.emoji - chosen.start.emoji == pytest.approx(0.2, abs=0.03)
