from __future__ import annotations

import datetime as dt
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel_tasks.annotation import collect, table9
from flywheel_tasks.annotation.agreement import agreement
from flywheel_tasks.core import schemas

AT = dt.datetime(2026, 11, 18, 9, tzinfo=dt.UTC)


def ledger(pairs: list[dict[str, Any]]) -> pa.Table:
    plain = {
        "user": "u", "character_id": "c", "source": "production", "locale": "en_US", "language": "en", "jtbd": None,
        "depth": None, "split": "train", "turns": [{"role": "user", "content": "hi"}], "policy0": "A", "policy1": "B",
        "made": "policy_pool", "mode": "static", "tool_call0": None, "tool_call1": None, "delta_length": 0,
        "delta_emoji": 0, "delta_list": 0, "delta_markdown": 0, "cycle": "2026-W47", "left": "y0", "digest": "d",
        "reviewers": 3,
    }  # fmt: skip
    rows = []
    for i, pair in enumerate(pairs):
        own = {
            "pair_id": f"p{i:04d}",
            "prompt_id": f"q{i}",
            "task_id": f"t{i}",
            "y0": f"first {i}",
            "y1": f"second {i}",
        }
        rows.append(plain | own | pair)
    return pa.Table.from_pylist(rows, schema=schemas.get("task"))


def reviews(said: list[tuple[int, str, str]], **columns: Any) -> pa.Table:
    """Rows of (pair number, annotator, preferred)."""
    rows = [
        {"annotation_id": f"{pair}-{who}", "pair_id": f"p{pair:04d}", "user": "u", "batch": "261118", "mode": "static",
         "annotator": who, "preferred": preferred, "strength": None, "questions": [], "rewrite": None, "seconds": 9.0,
         "at": AT} | {name: values[i] for name, values in columns.items()}
        for i, (pair, who, preferred) in enumerate(said)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=schemas.ANNOTATION)


SAID = [
    (0, "a", "y0"), (0, "b", "y0"), (0, "c", "y0"),
    (1, "a", "y0"), (1, "b", "y1"), (1, "c", "y1"),
    (2, "a", "y0"), (2, "b", "y1"), (2, "c", "tie"),
    (3, "a", "y0"), (3, "b", "tie"), (3, "c", "neither"),
    (4, "a", "y1"),
    (5, "a", "tie"), (5, "b", "tie"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "fewest", "decided", "undecided"),
    [
        ("unanimous", 2, {0: "y0"}, {"conflict": 2, "no_majority": 1, "no_preference": 1, "too_few_reviews": 1}),
        ("unanimous", 1, {0: "y0", 4: "y1"}, {"conflict": 2, "no_majority": 1, "no_preference": 1}),
        ("majority", 1, {0: "y0", 1: "y1", 4: "y1"}, {"conflict": 1, "no_majority": 1, "no_preference": 1}),
        ("majority", 3, {0: "y0", 1: "y1"},
         {"conflict": 1, "no_majority": 1, "too_few_reviews": 2}),
    ],
)  # fmt: skip
def test_rules_decide_as_they_say(rule: collect.Rule, fewest: int, decided: dict, undecided: dict) -> None:
    found = collect.collect(reviews(SAID), ledger([{}] * 7), rule, fewest, 17)
    chosen = {int(row["pair_id"][1:]): "y0" if row["chosen"].startswith("first") else "y1"
              for row in found.preferences.to_pylist()}  # fmt: skip
    assert (chosen, found.undecided) == (decided, undecided)
    reviewed = len({pair for pair, _, _ in SAID})
    assert len(found.preferences) + sum(found.undecided.values()) == reviewed


def test_the_conflict_is_kept_and_the_policies_follow_the_label() -> None:
    rows = {r["pair_id"]: r for r in collect.collect(reviews(SAID), ledger([{}] * 6), "majority", 1, 17)[0].to_pylist()}
    agreed, split, lone = rows["p0000"], rows["p0001"], rows["p0004"]
    assert (agreed["agreement"], agreed["conflict"], agreed["n_reviews"]) == ("unanimous", False, 3)
    assert (split["agreement"], split["conflict"], split["n_reviews"]) == ("majority", True, 3)
    assert (lone["agreement"], lone["conflict"], lone["n_reviews"]) == ("single", False, 1)
    assert (split["chosen"], split["policy_chosen"], split["policy_rejected"]) == ("second 1", "B", "A")


def test_a_single_review_is_drawn_fairly_and_the_same_again() -> None:
    said = [(pair, who, "y1" if who == "c" else "y0") for pair in range(600) for who in "abc"]
    found = collect.collect(reviews(said), ledger([{}] * 600), "single", 1, 17).preferences
    assert 0.27 < np.mean([text.startswith("second") for text in found["chosen"].to_pylist()]) < 0.4
    assert set(found["agreement"].to_pylist()) == {"single"}
    assert all(found["conflict"].to_pylist())
    order = np.random.default_rng(1).permutation(len(said))
    again = collect.collect(reviews([said[i] for i in order]), ledger([{}] * 600), "single", 1, 17).preferences
    assert found.equals(again)
    assert not found.equals(collect.collect(reviews(said), ledger([{}] * 600), "single", 1, 18).preferences)


def test_image_pairs_need_agreement_on_both_mandated_dimensions() -> None:
    def answers(timing: str, prompt: str) -> list[dict[str, str]]:
        return [{"name": "image_timing", "about": "y0", "answer": timing},
                {"name": "image_prompt", "about": "y0", "answer": prompt},
                {"name": "templated", "about": "y0", "answer": timing}]  # fmt: skip

    said = [(0, "a", "y0"), (0, "b", "y0"), (1, "a", "y0"), (1, "b", "y0"), (2, "a", "y0")]
    questions = [answers("yes", "well"), answers("yes", "well"), answers("yes", "well"), answers("yes", "badly"),
                 answers("yes", "well")]  # fmt: skip
    annotations = reviews(said, questions=questions, mode=["image"] * 5)
    call = '{"arguments": {}, "name": "image"}'
    found = collect.collect(annotations, ledger([{"mode": "image", "tool_call0": call}] * 3), "majority", 1, 17)
    assert found.preferences["pair_id"].to_pylist() == ["p0000"]
    assert found.undecided == {"image_dimensions_differ": 1, "too_few_reviews": 1}
    assert found.preferences["chosen"].to_pylist() == [f"first 0\n<tool_call>{call}</tool_call>"]


def test_a_preference_belongs_to_the_batch_of_its_first_review() -> None:
    annotations = reviews(SAID[:3], batch=["261202", "261118", "261125"])
    assert collect.collect(annotations, ledger([{}]), "majority", 1, 17).preferences["batch"].to_pylist() == ["261118"]


def test_the_three_variants_of_table_9() -> None:
    found = collect.variants(reviews(SAID), ledger([{}] * 6), 17)
    assert found["multi_agree"]["pair_id"].to_pylist() == ["p0000"]
    assert Counter(found["single_all"]["pair_id"].to_pylist()) == {
        "p0000": 3, "p0001": 3, "p0002": 2, "p0003": 1, "p0004": 1,
    }  # fmt: skip
    assert max(Counter(found["single_random"]["pair_id"].to_pylist()).values()) == 1
    assert {"p0000", "p0001", "p0004"} <= set(found["single_random"]["pair_id"].to_pylist())
    for table in found.values():
        assert len(set(table["preference_id"].to_pylist())) == len(table)


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from("abcd"), st.sampled_from(collect.LABELS)), max_size=40,
                unique_by=lambda row: row[:2]))  # fmt: skip
def test_every_reviewed_pair_is_decided_or_has_a_reason(said: list[tuple[int, str, str]]) -> None:
    for rule in ("unanimous", "majority", "single"):
        found = collect.collect(reviews(said), ledger([{}] * 10), rule, 1, 3)  # type: ignore[arg-type]
        assert len(found.preferences) + sum(found.undecided.values()) == len({pair for pair, _, _ in said})
        votes = {(pair, label) for pair, _, label in said}
        for row in found.preferences.to_pylist():
            side = "y0" if row["chosen"].startswith("first") else "y1"
            assert (int(row["pair_id"][1:]), side) in votes, "nobody's label is nobody's preference"


# -- Table 9 on real reviews: PandaLM's test set, three annotators for each of 999 pairs


@pytest.fixture(scope="module")
def panda(data_dir: Path) -> tuple[pa.Table, pa.Table, np.ndarray]:
    rows = json.loads((data_dir / "pandalm_testset" / "testset-v1.json").read_text())
    label = np.array([[row[f"annotator{k}"] for k in (1, 2, 3)] for row in rows])
    names = {0: "tie", 1: "y0", 2: "y1"}
    said = [(i, f"annotator{k}", names[int(label[i, k])]) for i in range(len(rows)) for k in range(3)]
    pairs = [
        {"y0": str(row["response1"]), "y1": str(row["response2"]), "policy0": row["cmp_key"].split("_")[0],
         "turns": [{"role": "user", "content": f"{row['instruction']}\n{row['input']}".strip()}]}
        for row in rows
    ]  # fmt: skip
    return reviews(said), ledger(pairs), label


def test_table_9s_layout_on_pandalm(panda: tuple[pa.Table, pa.Table, np.ndarray]) -> None:
    annotations, tasks, label = panda
    found = collect.variants(annotations, tasks, 17)
    sizes = {name: len(table) for name, table in found.items()}
    agree = (label == label[:, :1]).all(axis=1) & (label[:, 0] > 0)
    assert sizes["multi_agree"] == agree.sum()
    assert sizes["single_all"] == (label > 0).sum()
    expected = (label > 0).mean(axis=1).sum()
    assert abs(sizes["single_random"] - expected) < 4 * np.sqrt(expected * 0.1)
    single = {row["pair_id"]: row["chosen"] for row in found["single_random"].to_pylist()}
    multi = {row["pair_id"]: row["chosen"] for row in found["multi_agree"].to_pylist()}
    assert multi.items() <= single.items(), "where all agree, any single review says the same"
    rows = table9.table9({name: sizes[name] for name in ("multi_agree", "single_all", "single_random")},
                         {("multi_agree", "pairwise", "multi_agree"): 0.7287})  # fmt: skip
    text = table9.markdown(rows, {"single_random": sizes["single_random"], "multi_agree": sizes["multi_agree"]})
    lines = text.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in table9.ROWS.values()]
    assert "72.87" in lines[3]
    print(f"\n{text}")


def test_agreement_on_pandalm(panda: tuple[pa.Table, pa.Table, np.ndarray]) -> None:
    annotations, tasks, label = panda
    found = agreement(collect.ballots(annotations, tasks)[0].table)
    pairwise = np.mean([(label[:, a] == label[:, b]).mean() for a, b in ((0, 1), (0, 2), (1, 2))])
    assert found.raw == pytest.approx(pairwise)
    assert found.unanimous == pytest.approx((label == label[:, :1]).all(axis=1).mean())
    assert found.alpha is not None
    assert 0.5 < found.alpha < 1
    print(f"\n{found}")


def test_an_empty_import_gives_empty_tables() -> None:
    nothing = reviews([])
    assert len(collect.collect(nothing, ledger([]), "majority", 1, 17).preferences) == 0
    assert all(len(table) == 0 for table in collect.variants(nothing, ledger([{}]), 17).values())
