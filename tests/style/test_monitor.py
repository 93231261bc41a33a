"""Sec. 2.4.4: intervals that cover, alerts rarely false and not missed, and history kept apart (Sec. 3.5.6)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError
from scipy import stats

from flywheel_tasks.core import problems, schemas
from flywheel_tasks.style import monitor
from flywheel_tasks.style.effects import Effect, cohens_d, effect, slope
from flywheel_tasks.style.monitor import StyleConfig

Draw = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
REPEATS = 400


def test_without_clusters_it_is_welch() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=400), rng.normal(0.1, 2, size=300)
    found = effect(a, b, np.arange(400), 1000 + np.arange(300), "real")
    welch = stats.ttest_ind(a, b, equal_var=False)
    low, high = welch.confidence_interval()
    assert found.difference == pytest.approx(a.mean() - b.mean())
    assert (found.low, found.high, found.p) == pytest.approx((low, high, welch.pvalue), rel=1e-2)


def test_with_a_pair_in_each_cluster_it_is_the_paired_t_test() -> None:
    rng = np.random.default_rng(2)
    a = rng.normal(size=80)
    b = a + rng.normal(0.1, 0.3, size=80)
    found = effect(a, b, np.arange(80), np.arange(80), "real")
    paired = stats.ttest_rel(a, b)
    low, high = paired.confidence_interval()
    assert (found.low, found.high, found.p) == pytest.approx((low, high, paired.pvalue), rel=1e-9)


def test_the_slope_is_the_robust_one_of_least_squares() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=200), rng.normal(size=200)
    y += 0.5 * x
    found = slope(x, y, np.arange(200))
    assert found.slope == pytest.approx(stats.linregress(x, y).slope)
    assert found.slope is not None
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0.5 < found.high


def _characters(rng: np.random.Generator, kind: str, paired: bool, prevalence: float, clusters: int = 25) -> Draw:
    """Responses of characters who differ from each other, ten prompts each, no effect of the arm."""
    size = 10
    own = np.repeat(np.arange(clusters), size)
    taste = {side: rng.normal(size=clusters) for side in "ab"}
    if paired:
        taste["b"] = taste["a"]
    level = stats.norm.ppf(1 - prevalence) * np.sqrt(1.5)
    values = [taste[side][own] * np.sqrt(0.5) + rng.normal(size=len(own)) for side in "ab"]
    a, b = [(v > level).astype(float) if kind == "binary" else v for v in values]
    return a, b, own, own if paired else own + 1000


@pytest.mark.parametrize("paired", [True, False], ids=["paired", "unpaired"])
@pytest.mark.parametrize(("kind", "prevalence"), [("real", 0.5), ("binary", 0.3), ("binary", 0.03)])
def test_intervals_cover_and_false_findings_are_as_rare_as_promised(kind: Any, prevalence: float, paired: bool) -> None:
    rng = np.random.default_rng(4)
    found = [effect(*_characters(rng, kind, paired, prevalence), kind) for _ in range(REPEATS)]
    covered = np.mean([f.low <= 0 <= f.high for f in found if f.low is not None and f.high is not None])
    rejected = np.mean([f.p <= 0.05 for f in found if f.p is not None])
    # Three standard errors of a share of 400 around 95 %; rare binary features may cover more, never less.
    assert 0.917 <= covered <= (0.983 if prevalence > 0.1 else 1.0)
    assert rejected <= 0.083


def test_ignoring_the_characters_would_find_effects_that_are_not_there() -> None:
    """The control of the test above: the same data with every row a cluster of its own."""
    rng = np.random.default_rng(5)
    wrong = 0
    for _ in range(200):
        a, b, _, _ = _characters(rng, "real", False, 0.5)
        rows = np.arange(len(a))
        found = effect(a, b, rows, rows + len(a), "real")
        wrong += found.p is not None and found.p <= 0.05
    assert wrong > 40


@pytest.mark.parametrize(
    ("a", "b", "clusters"), [([], [1.0], [0]), ([1.0], [], [0]), ([1.0, 0.0], [1.0], [0, 0]), ([np.nan], [1.0], [0])]
)
def test_too_little_data_gives_no_interval(a: list[float], b: list[float], clusters: list[int]) -> None:
    found = effect(np.array(a), np.array(b), clusters[: len(a)], clusters[: len(b)], "binary")
    assert (found.low, found.high, found.p) == (None, None, None)


def test_three_of_three_is_not_certainty() -> None:
    found = effect(np.ones(3), np.zeros(3), np.arange(3), np.arange(3), "binary")
    assert found.difference == 1
    assert found.low is not None
    assert found.low < 0.9
    assert found.p is not None
    assert found.p > 0.01


def test_two_constants_that_differ_are_as_far_apart_as_it_gets() -> None:
    assert cohens_d(np.ones(40), np.zeros(40)) == 100
    assert cohens_d(np.zeros(40), np.zeros(40)) == 0


SENTENCE = "we walked along the river and talked about your day then had some tea near old bridge under a warm red sky"
WORDS = SENTENCE.split(" ")


def preference(rng: np.random.Generator, rows: int, change: Callable[[str], str] = str) -> pa.Table:
    said = [
        " ".join(rng.choice(WORDS, rng.integers(8, 20))) + rng.choice([".", "!", "?", " 😀"]) for _ in range(2 * rows)
    ]
    return pa.Table.from_pylist(
        [
            {
                "preference_id": f"r{n}",
                "prompt_id": f"p{n}",
                "user": "0" * 32,
                "character_id": f"c{n % 20}",
                "traffic": "user",
                "locale": "en_US",
                "language": "en",
                "jtbd": None,
                "mode": "static",
                "split": "train",
                "turns": [{"role": "user", "content": "hi"}],
                "chosen": change(said[n]),
                "rejected": said[rows + n],
                "agreement": "single",
                "n_reviews": 1,
                "conflict": False,
                "batch": "260101",
                "policy_chosen": "a",
                "policy_rejected": "b",
            }
            for n in range(rows)
        ],
        schema=schemas.PREFERENCE,
    )


def test_preferences_without_a_bias_raise_few_alerts() -> None:
    rng = np.random.default_rng(6)
    runs = [monitor.preferences(preference(rng, 120), StyleConfig(size=0.0)) for _ in range(40)]
    # Holm at 5 % over all features and a bound of nothing: at most about two comparisons in forty.
    assert sum(bool(run.alerts) for run in runs) <= 6


def test_a_taste_for_emoji_in_preferences_is_found_and_named() -> None:
    biased = preference(np.random.default_rng(7), 200, lambda text: text + " 🎉🎉")
    found = monitor.preferences(biased, StyleConfig())
    drifted = {finding.name for finding in found.findings if finding.status == "drift"}
    assert {"emoji", "has_emoji"} <= drifted
    assert not drifted & {"words", "has_list", "broken_markdown", "templated"}
    assert any("has_emoji is 100 % in chosen" in alert for alert in found.alerts)
    body = found.as_json()
    row = next(feature for feature in body["features"] if feature["name"] == "emoji")
    assert row["effect"] > 0.2
    assert row["low"] > 0
    assert row["n"] == 200


def test_few_responses_are_unknown_not_fine() -> None:
    found = monitor.preferences(preference(np.random.default_rng(8), 10), StyleConfig())
    assert {finding.status for finding in found.findings} == {"unknown"}


def completions(policy: str, texts: list[str], histories: list[list[str]], accepted: list[bool | None]) -> pa.Table:
    rows = [
        {
            "completion_id": f"{policy}{n}",
            "prompt_id": f"p{n}",
            "user": "0" * 32,
            "character_id": f"c{n % 15}",
            "locale": "en_US",
            "language": "en",
            "jtbd": None,
            "split": "eval",
            "text": text,
            "sample": 0,
            "tokens": len(text.split()),
            "logprob": None,
            "finish": "stop",
            "policy": policy,
            "scores": [],
            "accepted": taken,
            "reason": None,
            "turns": [
                turn
                for said in history
                for turn in ({"role": "assistant", "content": said}, {"role": "user", "content": "ok"})
            ],
        }
        for n, (text, history, taken) in enumerate(zip(texts, histories, accepted, strict=True))
    ]
    return pa.Table.from_pylist(rows, schema=schemas.COMPLETION)


def test_a_stage_that_shifts_style_is_told_from_one_that_does_not() -> None:
    rng = np.random.default_rng(9)
    plain = [" ".join(rng.choice(WORDS, 12)) for _ in range(150)]
    other = [" ".join(rng.choice(WORDS, 12)) for _ in range(150)]
    listed = ["\n".join(f"- {word}" for word in text.split()[:4]) for text in plain]
    empty: list[list[str]] = [[]] * 150
    none: list[bool | None] = [None] * 150
    tables = {
        name: completions(name, texts, empty, none) for name, texts in (("sft", plain), ("dpo", other), ("rl", listed))
    }
    dpo, rl = monitor.checkpoints(tables, StyleConfig())
    assert (dpo.a, dpo.b, rl.a, rl.b) == ("dpo", "sft", "rl", "dpo")
    assert dpo.alerts == ()
    assert {"has_list", "list_items"} <= {f.name for f in rl.findings if f.status == "drift"}


def test_what_selection_favours_is_compared_across_prompts() -> None:
    rng = np.random.default_rng(10)
    long = rng.random(300) < 0.5
    texts = [" ".join(rng.choice(WORDS, 30 if is_long else 8)) for is_long in long]
    accepted = [bool(x) for x in long ^ (rng.random(300) < 0.1)]
    found = monitor.sampling(completions("rs", texts, [[]] * 300, list(accepted)), StyleConfig())
    words = next(f for f in found.findings if f.name == "words")
    assert (found.a, found.b, words.status) == ("accepted", "rejected", "drift")


def test_style_that_the_history_had_is_told_from_style_that_the_response_added() -> None:
    rng = np.random.default_rng(12)
    had = rng.random(200) < 0.5
    histories = [["nice 😀" if has else "nice"] for has in had]
    mimics = ["ok 😀" if has else "ok then" for has in had]
    adds = ["ok 😀" if rng.random() < 0.5 else "ok then" for _ in had]
    none: list[bool | None] = [None] * 200
    found = monitor.between(
        completions("m", mimics, histories, none),
        completions("a", adds, histories, none),
        "mimics",
        "adds",
        StyleConfig(),
    )
    carried = found.history["has_emoji"]
    assert carried["mimics"]["prevalence"] == pytest.approx(had.mean())
    assert carried["mimics"]["slope"] == pytest.approx(1)
    assert carried["adds"]["low"] < 0 < carried["adds"]["high"]


def test_histories_in_pieces_are_measured_like_one() -> None:
    """Joined, the histories of a large week pass the 2 GiB that Arrow addresses."""
    rng = np.random.default_rng(13)
    histories = [["nice 😀"] * int(rng.integers(3)) for _ in range(90)]
    texts = [str(rng.choice(["ok 😀 (good)", "ok then", "- a\n- b"])) for _ in histories]
    table = completions("rs", texts, histories, [bool(n % 3) for n in range(90)])
    pieces = pa.concat_tables([table.slice(0, 1), table.slice(1, 50), table.slice(51, 0), table.slice(51)])
    assert monitor.sampling(pieces, StyleConfig()) == monitor.sampling(table, StyleConfig())
    assert monitor.sampling(table.slice(0, 0), StyleConfig()).alerts == ()


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ({"emojis": 0.1}, "no style feature 'emojis': did you mean 'emoji'?"),
        ({"emoji": -0.1}, "must be greater than or equal to 0.0"),
        ({"emoji": float("nan")}, "must be a finite number"),
    ],
)
def test_a_bound_that_is_none_is_refused_when_the_config_is_read(sizes: dict[str, float], why: str) -> None:
    with pytest.raises(ValidationError) as caught:
        StyleConfig(sizes=sizes)
    assert problems.first(caught.value, StyleConfig)[1] == why


def test_languages_are_compared_only_where_both_sides_have_theirs() -> None:
    table = completions("a", ["ok then"] * 40, [[]] * 40, [None] * 40)
    told = table.append_column("spoken", pa.array(["en"] * 40)).append_column("wanted", pa.array(["es"] * 40))
    for a, b, compared in ((told, told, True), (told, table, False), (table, table, False)):
        found = monitor.between(a, b, "a", "b", StyleConfig())
        assert ("language_mismatch" in {f.name for f in found.findings}) == compared
    assert "language_mismatch" not in {f.name for f in monitor.sampling(table, StyleConfig()).findings}


def test_effects_are_plain_numbers() -> None:
    found = effect(np.array([1.0, 0.0]), np.array([0.0, 0.0]), [0, 1], [0, 1], "binary")
    assert isinstance(found, Effect)
    assert all(value is None or isinstance(value, int | float) for value in found)
