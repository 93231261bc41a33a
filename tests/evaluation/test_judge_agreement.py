"""A judge is believed as far as it agrees with people: kappa with an interval that covers, measured on real labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.evaluation import agreement as module
from flywheel_tasks.evaluation.agreement import agreement, as_json, embedded, measure_embedded, measured, read_labelled
from flywheel_tasks.evaluation.judge import JudgeConfig, judge
from tests.evaluation.judge_endpoint import PERFECT, Endpoint, serving


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
def test_kappa_is_scikit_learns(rows: list[tuple[bool, bool]]) -> None:
    labels, verdicts = zip(*rows, strict=True)
    found = agreement(labels, verdicts, range(len(rows)))
    assert found is not None
    expected = cohen_kappa_score(labels, verdicts) if len({*labels, *verdicts}) > 1 else 0.0
    assert found.kappa == pytest.approx(expected, abs=1e-12)
    assert found.accuracy == np.mean(np.equal(labels, verdicts))
    assert -1 <= found.low <= found.high <= 1


def test_the_interval_of_kappa_covers() -> None:
    rng = np.random.default_rng(1)
    prompts, each = 60, 3

    def draw(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        group = np.repeat(np.arange(count), each)
        hard = rng.random(count)[group] * 0.4
        labels = rng.random(len(group)) < 0.3
        return labels, labels ^ (rng.random(len(group)) < hard), group

    labels, verdicts, _ = draw(400_000)
    truth = cohen_kappa_score(labels, verdicts)
    found = [agreement(*draw(prompts), seed=n) for n in range(300)]
    covered = np.mean([one.low <= truth <= one.high for one in found if one])
    assert 0.90 <= covered <= 0.985


def test_perfect_agreement_on_few_responses_is_not_certainty() -> None:
    few, many = (agreement([True, False] * n, [True, False] * n, range(2 * n)) for n in (3, 300))
    assert few is not None
    assert many is not None
    assert (few.kappa, many.kappa) == (1, 1)
    assert few.low < 0.6 < many.low


@pytest.mark.parametrize("labels", [[], [True], [True, False]])
def test_of_one_prompt_there_is_no_agreement(labels: list[bool]) -> None:
    assert agreement(labels, labels, [0] * len(labels)) is None


def test_a_judge_that_always_says_the_same_has_no_agreement() -> None:
    found = agreement([True] * 5 + [False] * 95, [False] * 100, range(100))
    assert found is not None
    assert (found.kappa, found.accuracy) == (0, 0.95)


def test_the_embedded_judges_numbers_are_what_xstest_gives(data_dir: Path) -> None:
    stored = json.loads((Path(module.__file__).parent / "agreement.json").read_text(encoding="utf-8"))
    assert {policy: as_json(found) for policy, found in measure_embedded(data_dir / "xstest").items()} == stored[
        "policies"
    ]
    people = stored["policies"]["llama2orig"]["false_refusal"]
    assert (people["n"], people["positive"]) == (250, 149)


def test_the_embedded_judge_is_as_good_as_on_its_worst_policy() -> None:
    assert set(embedded()) == {"false_refusal", "cooperative_ratio"}
    assert embedded()["false_refusal"].kappa == pytest.approx(0.7477)


def test_labels_are_put_to_the_same_judge_and_what_it_left_out_is_counted() -> None:
    rows = [
        {
            "metric": "false_refusal",
            "response": f"r{n}",
            "label": n % 2 == 0,
            "turns": [{"role": "user", "content": f"p{n}"}],
        }
        for n in range(6)
    ]
    labelled = list(read_labelled(map(json.dumps, rows), "labels.jsonl"))
    replies = [PERFECT | {"refusal": "unnecessary" if n % 2 == 0 else "none"} for n in range(5)]
    with serving(Endpoint(*replies, "I can't say")) as endpoint:
        config = JudgeConfig(kind="http", url=endpoint.url, model="m", parallel=1, retries=0)
        found = measured(labelled, judge([one.item for one in labelled], config))
    assert found["false_refusal"].kappa == 1
    assert (found["false_refusal"].n, found["false_refusal"].missing) == (5, 1)


def test_answers_of_one_group_stay_together_with_turns_or_without() -> None:
    def groups(**more: Any) -> list[str]:
        rows = [{"metric": "false_refusal", "response": f"r{n}", "label": True} | more for n in range(3)]
        return [one.group for one in read_labelled(map(json.dumps, rows), "labels.jsonl")]

    turns = [{"role": "user", "content": "hi"}]
    assert groups(group="one prompt") == groups(group="one prompt", turns=turns) == ["one prompt"] * 3
    assert groups(group=0) == ["0"] * 3
    assert groups(turns=turns) == ["hi"] * 3
    assert groups() == ["r0", "r1", "r2"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not a labelled response"),
        ('{"metric": "x", "response": "r", "label": true}', "no judged metric 'x'"),
        ('{"metric": "false_refusal", "response": "r", "label": "yes"}', "label true or false"),
        ('{"metric": "false_refusal", "label": true}', "not a labelled response"),
        ('{"metric": "false_refusal", "response": "r", "label": true, "turns": ["hi"]}', "not a labelled response"),
        ("[]", "not a labelled response"),
    ],
)
def test_a_wrong_label_is_named_by_its_line(line: str, says: str) -> None:
    with pytest.raises(InputError, match=f"labels.jsonl:2: .*{says}"):
        list(read_labelled(["", line], "labels.jsonl"))
