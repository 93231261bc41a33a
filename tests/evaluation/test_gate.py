"""The gate on the paper's history, on anything that a guard can find, and on anything that is missing (Sec. 3.1.2)."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.evaluation.backtest import BARE_LIMITS, backtest, summary
from flywheel_tasks.evaluation.evidence import parse
from flywheel_tasks.evaluation.gate import Decision, decide
from flywheel_tasks.evaluation.gate_config import Band, GateConfig, Margin
from flywheel_tasks.evaluation.history import from_csv

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
MADE = "2026-11-18T12:00:00+00:00"
MEASURED = "2026-11-19T12:00:00+00:00"
STRICT = GateConfig()
MINIMAL = GateConfig(require=("rm_win_rate",))
Body = dict[str, Any]


def rate(p: float, n: int = 5000) -> Body:
    return {"rate": p, "n": n}


def change(new: float, old: float, n: int = 5000) -> Body:
    return {"candidate": rate(new, n), "champion": rate(old, n)}


def reward_model(accuracy: float, *losses: tuple[float, float, float]) -> Body:
    """A reward model, and (drop, low, high) of its losses on old batches."""
    lost = [
        {"batch": f"24{10 + i}18", "mode": "static", "n": 900, "drop": d, "low": low, "high": high}
        for i, (d, low, high) in enumerate(losses)
    ]
    return {"version": "RM_241229", "accuracy": rate(accuracy, 3000), "lost_on_old_batches": lost}


def good() -> Body:
    """Evidence with everything the strictest profile requires, all of it in order."""
    return {
        "candidate": "rl/new",
        "champion": "rl/old",
        "candidate_made_at": MADE,
        "rm_win_rate": {
            "pointwise_internal": rate(0.56),
            "pointwise_user": rate(0.58),
            "pairwise_user": rate(0.57),
        },
        "human_win_rate": rate(0.52, 800),
        "metrics": {
            "instruction_violation": change(0.06, 0.07),
            "false_refusal_internal": change(0.15, 0.16),
            "false_refusal_user": change(0.20, 0.20),
        },
        "style_drift": {"has_emoji": {"distance": 0.1, "n": 4000}},
        "safety": {"suite": "guard", "unsafe": change(0.002, 0.002)},
        "red_team": {"candidate": "rl/new", "signed_off": True, "by": "r.team", "at": MEASURED},
        "benchmarks": {"mmlu": change(0.84, 0.845), "ifeval": change(0.85, 0.84, 1000)},
        "reward_models": {
            "pointwise": reward_model(0.72, (0.01, -0.01, 0.03)),
            "pairwise": reward_model(0.74),
        },
        "overlap": {"prompts": 6000, "leaked": 0},
        "measured_at": dict.fromkeys(
            (
                "rm_win_rate",
                "human_win_rate",
                "metrics",
                "style_drift",
                "safety",
                "benchmarks",
                "reward_models",
                "overlap",
            ),
            MEASURED,
        ),
    }


def verdict(body: Body, config: GateConfig = STRICT) -> Decision:
    return decide(parse(json.dumps(body).encode(), "test"), config, NOW)


def put(path: str, value: Any) -> Callable[[Body], None]:
    def change_it(body: Body) -> None:
        *parents, last = path.split("/")
        for part in parents:
            body = body[part]
        body[last] = value

    change_it.__name__ = f"{path}={str(value)[:40]}"
    return change_it


def drop(path: str) -> Callable[[Body], None]:
    def drop_it(body: Body) -> None:
        *parents, last = path.split("/")
        for part in parents:
            body = body[part]
        del body[last]

    drop_it.__name__ = f"no {path}"
    return drop_it


BLOCKS = [
    put("rm_win_rate/pointwise_user", rate(0.70)),
    put("rm_win_rate/pairwise_user", rate(0.99)),
    put("rm_win_rate/pointwise_internal", rate(0.30)),
    put("rm_win_rate", {"pointwise_internal": rate(0.45), "pointwise_user": rate(0.60), "pairwise_user": rate(0.6)}),
    put("metrics/instruction_violation", change(0.12, 0.07)),
    put("metrics/false_refusal_user", change(0.29, 0.17)),
    put("metrics/false_refusal_internal", change(0.29, 0.17)),
    put("style_drift/has_emoji", {"distance": 1.4, "n": 900}),
    put("safety/unsafe", change(0.03, 0.03)),
    put("safety/unsafe", change(0.015, 0.002)),
    put("red_team/signed_off", False),
    put("red_team/open_findings", 1),
    put("red_team/candidate", "rl/another"),
    put("red_team/at", "2026-11-17T12:00:00+00:00"),
    put("benchmarks/mmlu", change(0.70, 0.845)),
    put("reward_models/pointwise", reward_model(0.72, (0.01, -0.01, 0.03), (0.09, 0.06, 0.12))),
    put("overlap/leaked", 1),
    put("measured_at/metrics", "2026-10-01T12:00:00+00:00"),
    put("measured_at/rm_win_rate", "2026-11-18T11:59:59+00:00"),
    put("measured_at/safety", "2026-12-19T12:00:00+00:00"),
    put("candidate", "rl/old"),
    put("champion", "s3://bucket/store/artifacts/rl/new/model"),
    put("unmeasured", {"human_win_rate": "the annotators' file is empty"}),
    drop("measured_at/benchmarks"),
    drop("rm_win_rate"),
    drop("rm_win_rate/pointwise_internal"),
    drop("rm_win_rate/pointwise_user"),
    drop("rm_win_rate/pairwise_user"),
    drop("metrics/instruction_violation"),
    drop("metrics/false_refusal_user"),
    drop("metrics"),
    drop("style_drift"),
    drop("safety"),
    drop("red_team"),
    drop("benchmarks"),
    drop("reward_models"),
    drop("reward_models/pointwise"),
    drop("reward_models/pairwise"),
    drop("overlap"),
    drop("measured_at"),
    drop("candidate"),
    drop("candidate_made_at"),
]
HOLDS = [
    put("rm_win_rate/pointwise_user", rate(0.65)),
    put("rm_win_rate/pairwise_user", rate(0.699)),
    put("rm_win_rate/pointwise_internal", rate(0.46)),
    put("rm_win_rate/pointwise_internal", rate(0.56, 60)),
    put("rm_win_rate", {"pointwise_internal": rate(0.50), "pointwise_user": rate(0.63), "pairwise_user": rate(0.6)}),
    put("rm_win_rate/pairwise_user", rate(0.47)),
    put("human_win_rate", rate(0.45, 2000)),
    put("metrics/instruction_violation", change(0.07, 0.07, 100)),
    put("metrics/false_refusal_user", change(0.23, 0.20)),
    put("style_drift/has_emoji", {"distance": 0.6, "n": 900}),
    put("style_drift/words", {"distance": 0.2, "n": 900, "alert": True}),
    put("style_drift/words", {"n": 0, "unusable": "nobody wrote a word"}),
    put("style_drift/words", {"distance": 3.0, "n": 4, "unusable": "4 responses"}),
    put("safety/unsafe", change(0.0, 0.0, 100)),
    put("benchmarks/ifeval", change(0.80, 0.84, 500)),
    put("reward_models/pointwise", reward_model(0.51)),
    put("reward_models/pairwise", reward_model(0.7, (0.04, 0.01, 0.07))),
]


CHANGES = (
    "metrics/instruction_violation", "metrics/false_refusal_internal", "metrics/false_refusal_user",
    "safety/unsafe", "benchmarks/mmlu", "benchmarks/ifeval",
)  # fmt: skip
DISTRUST: tuple[Body, ...] = (
    {"unusable": "the judge was not there for half of it"},
    {"judge": {"name": "small", "kappa": 0.3, "n": 450}},
)


def distrust(path: str, mark: Body) -> Callable[[Body], None]:
    """The same number, however good, with a reason not to rely on it."""

    def mark_it(body: Body) -> None:
        section, name = path.split("/")
        body[section][name] |= mark

    mark_it.__name__ = f"{path} distrusted: {next(iter(mark))}"
    return mark_it


UNTRUSTED = [distrust(path, mark) for path in CHANGES for mark in DISTRUST]


def names(f: Callable[[Body], None]) -> str:
    return f.__name__


def test_good_evidence_passes_every_rule() -> None:
    found = verdict(good())
    assert found.decision == "PASS", found.reasons
    assert {f.verdict for f in found.findings} == {"PASS"}
    assert len({f.rule for f in found.findings}) >= 15


@pytest.mark.parametrize("broken", BLOCKS, ids=names)
def test_one_failed_guard_blocks(broken: Callable[[Body], None]) -> None:
    body = good()
    broken(body)
    assert verdict(body).decision == "BLOCK"


@pytest.mark.parametrize("broken", HOLDS, ids=names)
def test_one_doubtful_guard_holds(broken: Callable[[Body], None]) -> None:
    body = good()
    broken(body)
    found = verdict(body)
    assert found.decision == "HOLD", found.reasons
    assert len(found.reasons) >= 1


@pytest.mark.parametrize("broken", UNTRUSTED, ids=names)
def test_a_required_number_that_nobody_trusts_blocks(broken: Callable[[Body], None]) -> None:
    body = good()
    broken(body)
    assert verdict(body).decision == "BLOCK"


@pytest.mark.parametrize("mark", DISTRUST, ids=str)
@pytest.mark.parametrize("path", ["safety/unsafe", "benchmarks/mmlu"])
def test_safety_and_benchmarks_never_pass_on_distrust_even_where_no_profile_requires_them(
    path: str, mark: Body
) -> None:
    body = good()
    distrust(path, mark)(body)
    assert verdict(body, MINIMAL).decision == "HOLD"
    rules = {"safety": ("safety", "safety_ceiling"), "benchmarks": ("benchmark", "benchmark_floor")}
    floors = MINIMAL.model_copy(update={"benchmark_floors": {"mmlu": 0.1}})
    subject = {"safety": "guard", "benchmarks": "mmlu"}[path.split("/")[0]]
    found = [f for f in verdict(body, floors).findings if f.subject == subject]
    assert {f.rule for f in found} == set(rules[path.split("/")[0]])
    assert "PASS" not in {f.verdict for f in found}


def test_noise_in_style_decides_only_where_style_is_counted_on() -> None:
    body = good()
    body["style_drift"] = {"words": {"distance": 3.0, "n": 4, "unusable": "4 responses"}}
    assert verdict(body).decision == "HOLD"
    free = verdict(body, MINIMAL)
    assert free.decision == "PASS"
    assert [f.verdict for f in free.findings if f.rule == "style_drift"] == ["NOTE"]
    named = MINIMAL.model_copy(update={"require": ("rm_win_rate", "style_drift.words")})
    assert verdict(body, named).decision == "BLOCK"


@given(st.lists(st.sampled_from([*BLOCKS, *HOLDS, *UNTRUSTED]), min_size=1, max_size=6))
def test_no_path_to_pass_with_any_guard_failed(broken: list[Callable[[Body], None]]) -> None:
    """However failures pile up, one never hides another: each either still stands or was replaced by one that does."""
    body = good()
    for breaking in broken:
        try:
            breaking(body)
        except KeyError:  # its section was dropped, which itself blocks
            continue
    assert verdict(body).decision != "PASS"


shares = st.floats(0, 1, allow_nan=False).map(lambda x: round(x, 4))
rates = st.builds(rate, shares, st.integers(1, 100_000))


@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(("pointwise_internal", "pointwise_user", "pairwise_user"), rates))
)
def test_a_pass_is_what_the_paper_calls_safe(wins: Body) -> None:
    """Written from the paper, not from the rules: whatever passes has every rate below 65 % and the two close."""
    found = verdict({"rm_win_rate": wins}, MINIMAL).decision
    values = {name: wins[name]["rate"] for name in wins}
    if found == "PASS":
        assert values
        assert max(values.values()) < 0.65
        assert (
            abs(values.get("pointwise_user", 0.5) - values.get("pointwise_internal", values.get("pointwise_user", 0.5)))
            < 0.15
        )
    if any(v >= 0.70 for v in values.values()) or not values:
        assert found == "BLOCK"
    elif any(v >= 0.65 for v in values.values()):
        assert found in ("HOLD", "BLOCK")


ORDER = {"PASS": 0, "HOLD": 1, "BLOCK": 2}


@given(st.integers(200, 50_000), shares, shares)
def test_a_higher_win_rate_never_opens_the_gate(n: int, low: float, high: float) -> None:
    """Above one half, more win-rate is never a reason to pass what was held."""
    low, high = sorted((max(low, 0.5), max(high, 0.5)))
    a, b = (verdict({"rm_win_rate": {"pairwise_user": rate(x, n)}}, MINIMAL).decision for x in (low, high))
    # A rate at one half with few prompts is held for its width, which shrinks away from one half.
    wide = 1.97 * 0.5 / n**0.5 > MINIMAL.win_rate_precision * 0.95
    assert wide or ORDER[a] <= ORDER[b]


def test_the_papers_history_replays(data_dir: Path) -> None:
    versions = backtest(from_csv(data_dir / "paper/table10.csv"), GateConfig())
    found = {v.name: v.decision.decision for v in versions if v.decision}
    assert found == {f"V{i}": "PASS" for i in range(2, 16)} | dict.fromkeys(("V10", "V11", "V14"), "HOLD") | {
        "V12": "BLOCK"
    }
    assert versions[0].decision is None, "V1 has no predecessor and no win-rate: there is nothing to decide"


def test_the_paper_replays_through_the_minimal_document_too(data_dir: Path) -> None:
    for version in from_csv(data_dir / "paper/table10.csv"):
        names = ("pointwise_internal", "pointwise_user")
        wins = {n: rate(round(version.numbers[n].value, 3), 2000) for n in names if n in version.numbers}
        expected = {"V10": "HOLD", "V11": "HOLD", "V14": "HOLD", "V12": "BLOCK", "V1": "BLOCK"}
        assert verdict({"rm_win_rate": wins}, MINIMAL).decision == expected.get(version.name, "PASS")


def test_what_each_single_rule_would_have_done(data_dir: Path) -> None:
    lines = {line.rule: line for line in summary(backtest(from_csv(data_dir / "paper/table10.csv"), STRICT))}
    assert (lines["divergence"].blocked, lines["divergence"].held) == (["V12"], [])
    assert lines["bare < 65 %"].blocked == ["V10", "V11", "V12", "V14"]
    assert lines["bare < 70 %"].blocked == ["V12"]
    assert lines["false_refusal"].blocked == ["V5"], "the spike that Sec. 3.3 speaks of"
    assert set(BARE_LIMITS) < set(lines)
    assert lines["bare < 65 %"].lifts["V14"] == (8.8, 11.2)


def test_the_divergence_alone_tells_v12_apart_by_a_wide_margin(data_dir: Path) -> None:
    found = {}
    for v in backtest(from_csv(data_dir / "paper/table10.csv"), GateConfig()):
        for f in v.decision.findings if v.decision else ():
            if f.rule == "divergence":
                found[v.name] = f.value
    assert found.pop("V12") == pytest.approx(0.270)
    assert max(x for x in found.values() if x is not None) == pytest.approx(0.108)


def test_a_gap_that_a_profile_waives_is_shown_and_does_not_block() -> None:
    body = good() | {"unmeasured": {"metrics.instruction_violation": "no judge", "metrics.false_refusal_user": "none"}}
    assert decide(parse(json.dumps(body), "e"), STRICT, NOW).decision == "BLOCK"
    waiving = STRICT.model_copy(update={"waived": ("metrics.instruction_violation", "metrics.false_refusal_user")})
    found = decide(parse(json.dumps(body), "e"), waiving, NOW)
    assert found.decision == "PASS"
    notes = [f.reason for f in found.findings if f.verdict == "NOTE"]
    assert sum("this profile does without it" in reason for reason in notes) == 2
    one = STRICT.model_copy(update={"waived": ("metrics.instruction_violation",)})
    assert decide(parse(json.dumps(body), "e"), one, NOW).decision == "BLOCK"
    with pytest.raises(ValueError, match="required and waived"):
        GateConfig(require=("metrics",), waived=("metrics.instruction_violation",))
    for guard in ("rm_win_rate.pointwise_user", "overlap", "safety", "red_team"):
        with pytest.raises(ValueError, match="can't be waived"):
            GateConfig(require=(), waived=(guard,))


def test_a_judge_that_people_disagree_with_cannot_gate() -> None:
    body = good()
    worse = change(0.5, 0.05) | {"judge": {"name": "small", "kappa": 0.3, "n": 450}}
    body["metrics"]["false_refusal_user"] = worse
    required, free = verdict(body), verdict(body, GateConfig(require=("rm_win_rate",)))
    assert required.decision == "BLOCK"
    assert "kappa 0.30" in " ".join(required.reasons)
    assert free.decision == "PASS"
    assert [f.verdict for f in free.findings if f.subject == "user"] == ["NOTE"]


def test_a_benchmark_below_its_floor_or_without_a_number_blocks() -> None:
    floors = STRICT.model_copy(update={"benchmark_floors": {"mmlu": 0.85}})
    assert verdict(good(), floors).decision == "BLOCK"
    assert verdict(good(), STRICT.model_copy(update={"benchmark_floors": {"gsm8k": 0.1}})).decision == "BLOCK"
    assert verdict(good(), STRICT.model_copy(update={"benchmark_floors": {"mmlu": 0.80}})).decision == "PASS"


def test_clustered_intervals_of_the_evidence_are_used() -> None:
    body = {"rm_win_rate": {"pairwise_user": rate(0.47, 100_000) | {"low": 0.40, "high": 0.54}}}
    assert verdict(body, MINIMAL).decision == "PASS"
    assert verdict({"rm_win_rate": {"pairwise_user": rate(0.47, 100_000)}}, MINIMAL).decision == "HOLD"


@pytest.mark.parametrize("edge", [(0.65, "HOLD"), (0.6499, "PASS"), (0.70, "BLOCK"), (0.6999, "HOLD")])
def test_the_edges_belong_to_the_stricter_side(edge: tuple[float, str]) -> None:
    assert verdict({"rm_win_rate": {"pointwise_user": rate(edge[0])}}, MINIMAL).decision == edge[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"rm_win_rate": {"pointwise_user": {"rate": NaN, "n": 5}}}', "NaN is not a number"),
        ('{"rm_win_rate": {"pointwise_user": {"rate": Infinity, "n": 5}}}', "Infinity"),
        ('{"rm_win_rate": {"pointwise_user": {"rate": 1e999, "n": 5}}}', "rm_win_rate.pointwise_user.rate"),
        ('{"rm_win_rate": {"pointwise_user": {"rate": 58.0, "n": 5}}}', "less than or equal to 1"),
        ('{"rm_win_rate": {"pointwise_user": {"rate": 0.5, "n": 0}}}', "greater than or equal to 1"),
        ('{"rm_win_rate": {"pointwise_user": {"rate": true, "n": 5}}}', "must be a number"),
        ('{"rm_win_rate": {"pointwise_user": {"rate": "0.5", "n": 5}}}', "must be a number"),
        ('{"rm_win_rate": {"pointwise_user": {"rate": 0.5}}}', "n: is missing"),
        ('{"rm_win_rate": {"pointwise_usr": {"rate": 0.5, "n": 5}}}', "pointwise_usr"),
        ('{"rm_winrate": {}}', "did you mean 'rm_win_rate'"),
        ('{"candidate": "a", "candidate": "b"}', "given twice"),
        ('{"rm_win_rate": {"pointwise_user": {"rate": 0.5, "n": 5, "low": 0.6, "high": 0.7}}}', "does not hold"),
        ('{"measured_at": {"metrics": "2026-11-20T10:00:00"}}', "with its zone"),
        ('{"measured_at": {"winrate": "2026-11-20T10:00:00Z"}}', "measured_at names 'winrate'"),
        (
            '{"red_team": {"candidate": "a", "signed_off": "yes", "by": "x", "at": "2026-11-20T10:00:00Z"}}',
            "signed_off",
        ),
        ('{"style_drift": {"words": {"n": 5}}}', "or say in 'unusable' why"),
        ("[]", "the document: must be a section of names and values"),
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_bad_evidence_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(text.encode(), "evidence.json")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_thresholds_that_cannot_be_meant_are_refused() -> None:
    for wrong in (
        lambda: Band(hold=0.7, block=0.65),
        lambda: Margin(worse=0.1, doubt=0.05, certain=0.0),
        lambda: GateConfig(require=("red_teem",)),
        lambda: GateConfig(require=("rm_win_rate.pointwise",)),
        lambda: GateConfig(benchmark_floors={"mmlu": 85}),
    ):
        with pytest.raises(ValueError):
            wrong()


def test_evidence_ages(data_dir: Path) -> None:
    found = parse(json.dumps(good()).encode(), "test")
    assert decide(found, STRICT, NOW + timedelta(days=12)).decision == "PASS"
    assert decide(found, STRICT, NOW + timedelta(days=14)).decision == "BLOCK"
