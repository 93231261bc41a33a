"""Table 9 end to end: one set of noisy reviews, three training sets, and a model of each on both evaluation sets."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from flywheel_tasks.annotation.table9 import ROWS, Row, markdown
from flywheel_tasks.core import schemas
from flywheel_tasks.core.config import ModelConfig
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.store import Store
from flywheel_tasks.models.lora import Lora
from flywheel_tasks.preherding.preference_config import PreferenceConfig
from flywheel_tasks.preherding.preference_rm import POINTWISE
from flywheel_tasks.training.config import TrainingConfig
from tests.curation.curation_runs import run
from tests.preherding.conftest import Given, preferences

PAIRS, REVIEWERS, WRONG = 160, 3, 0.2


def reviewed(pairs: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The pairs as they were shown, the better side first or second by chance, and three reviews of each of which one
    in five is mistaken."""
    rng = np.random.default_rng(3)
    tasks, annotations = [], []
    for i, pair in enumerate(pairs.to_pylist()):
        best = int(rng.integers(2))
        sides = {f"y{best}": pair["chosen"], f"y{1 - best}": pair["rejected"]}
        common = {
            name: pair[name] for name in ("pair_id", "prompt_id", "user", "character_id", "locale", "split", "turns")
        }
        shown = {"task_id": f"t{i}", "cycle": "2026-W47", "left": "y0", "digest": "0", "reviewers": REVIEWERS}
        made = {"source": "production", "mode": "static", "made": "policy_pool", "policy0": "a", "policy1": "b"}
        deltas = dict.fromkeys(("delta_length", "delta_emoji", "delta_list", "delta_markdown"), 0)
        tasks.append(dict.fromkeys(schemas.TASK.names) | common | sides | shown | made | deltas)
        for person in range(REVIEWERS):
            said = best if rng.random() > WRONG else 1 - best
            annotations.append(
                dict.fromkeys(schemas.ANNOTATION.names)
                | {"annotation_id": f"a{i}-{person}", "pair_id": pair["pair_id"], "user": pair["user"],
                   "batch": pair["batch"], "mode": "static", "annotator": f"r{person}", "preferred": f"y{said}",
                   "questions": [], "at": datetime.datetime(2026, 11, 16, tzinfo=datetime.UTC)}
            )  # fmt: skip
    return pa.Table.from_pylist(annotations, schemas.ANNOTATION), pa.Table.from_pylist(tasks, schemas.TASK)


def given_reviews(given: Given, characters: pa.Table, pairs: pa.Table) -> dict[str, Any]:
    annotations, tasks = reviewed(pairs)
    return {
        "preferences": (given("annotate-import", {"preferences": pairs}), "preferences"),
        "characters": (given("ingest", {"characters": characters}), "characters"),
        "annotations": (given("annotate-import", {"annotations": annotations}), "annotations"),
        "tasks": (given("annotate-export", {"tasks": tasks}), "tasks"),
        "before": None,
    }


@pytest.mark.parametrize(
    ("lost", "why"),
    [
        ("annotations", "Table 9 needs the reviews"),
        ("eval", "no held-out pair is in 'single_random'"),
        ("train", "no pair to train on is in 'multi_agree'"),
    ],
)
def test_reviews_that_give_no_table_are_told_before_any_training(
    store: Store, given: Given, characters: pa.Table, lost: str, why: str, tmp_path: Path
) -> None:
    pairs = preferences(40, ("261116",))
    inputs = given_reviews(given, characters, pairs)
    kept = pairs.filter(pc.not_equal(pairs["split"], lost))
    others = given_reviews(given, characters, kept)
    inputs |= {name: None if lost == "annotations" else others[name] for name in ("annotations", "tasks")}
    config = PreferenceConfig(base=ModelConfig(path=str(tmp_path / "never read")), variants=True)
    with pytest.raises(InputError, match=f"{why}.*variants=false"):
        run(POINTWISE, store, config, inputs)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_table_from_one_set_of_reviews(
    store: Store, given: Given, characters: pa.Table, tiny_model: Path
) -> None:
    pairs = preferences(PAIRS, ("261109",))
    inputs = given_reviews(given, characters, pairs)
    config = PreferenceConfig(
        base=ModelConfig(path=str(tiny_model)),
        lora=Lora(rank=8),
        train=TrainingConfig(epochs=3, batch=16, learning_rate=5e-3),
        max_tokens=512,
        variants=True,
    )
    found = run(POINTWISE, store, config, inputs, key="9" * 32).json("report")["table9"]
    rows = {row["training"]: Row(**row) for row in found["rows"]}
    print(markdown(list(rows.values()), {e["evaluation"]: e["n"] for e in found["intervals"]}))
    assert list(rows) == list(ROWS)
    train, held_out = 120, 40
    # All three agree on a pair with chance 0.8^3 + 0.2^3; every review is a row of "all", one of each pair of "random".
    assert rows["baseline"].size == 0
    assert 0.35 * train < rows["multi_agree"].size < 0.7 * train
    assert (rows["single_all"].size, rows["single_random"].size) == (REVIEWERS * train, train)
    sizes = {(cell["training"], cell["evaluation"]): cell["n"] for cell in found["intervals"]}
    assert len(sizes) == 8
    assert {n for (_, on), n in sizes.items() if on == "single_random"} == {held_out}
    on_agreed = {name: row.accuracies[1] for name, row in rows.items()}
    on_random = {name: row.accuracies[0] for name, row in rows.items()}
    for name in ("multi_agree", "single_all", "single_random"):
        # Where reviewers agreed they are right 98 times in 100; a single label is wrong one time in five.
        assert on_agreed[name] > max(0.85, on_random[name])
        assert on_agreed[name] > on_agreed["baseline"]
    assert all([*row.accuracies[2:]] == [None, None] for row in rows.values()), "the pairwise half is the other stage's"
