"""Both preference models learn what people liked, beat rules that read nothing, and fill Table 8 cycle by cycle."""

from __future__ import annotations

import csv
import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from flywheel_tasks.core import schemas
from flywheel_tasks.core.config import ModelConfig
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.stage import Inputs, Stage
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.models.lora import Lora
from flywheel_tasks.preherding.preference_config import PreferenceConfig
from flywheel_tasks.preherding.preference_rm import PAIRWISE, POINTWISE, version
from flywheel_tasks.preherding.variants import reviews
from flywheel_tasks.training.config import TrainingConfig
from tests.curation.curation_runs import commit, run
from tests.preherding.conftest import Given, preferences


def config(model: Path, **changes: Any) -> PreferenceConfig:
    base = {
        "base": ModelConfig(path=str(model)),
        "lora": Lora(rank=8),
        "train": TrainingConfig(epochs=3, batch=16, learning_rate=5e-3),
        "max_tokens": 512,
    }
    return PreferenceConfig(**{**base, **changes})


def trained(
    stage: Stage,
    store: Store,
    given: Given,
    characters: pa.Table,
    pairs: pa.Table,
    model: Path,
    key: str,
    before: Any = None,
) -> Artifact:
    inputs = {
        "preferences": (given("annotate-import", {"preferences": pairs}), "preferences"),
        "characters": (given("ingest", {"characters": characters}), "characters"),
        "before": (before, "report") if before else None,
    }
    return run(stage, store, config(model), inputs, key=key)


@pytest.mark.parametrize("stage", [POINTWISE, PAIRWISE], ids=lambda stage: stage.name)
def test_it_learns_what_people_liked(
    stage: Stage, store: Store, given: Given, characters: pa.Table, tiny_model: Path
) -> None:
    made = trained(stage, store, given, characters, preferences(160, ("261109", "261116")), tiny_model, "a" * 32)
    report = made.json("report")
    assert report["version"] == "RM_261116"
    assert report["style"]["name"] == "preferences"
    overall = report["overall"]
    assert overall["model"]["low"] > 0.6 > overall["more_emoji_wins"]["accuracy"] == 0.5
    assert {(c["batch"], c["n"]) for c in report["accuracy"]} == {("261109", 40), ("all", 40)}
    rows = made.manifest.rows
    assert rows is not None
    assert (rows.rows_in, rows.rows_out, rows.rows_rejected) == (160, 160, 0)


@pytest.mark.slow
def test_table_8_grows_and_earlier_versions_meet_batches_they_never_saw(
    store: Store, given: Given, characters: pa.Table, tiny_model: Path
) -> None:
    first = trained(POINTWISE, store, given, characters, preferences(80, ("261109",)), tiny_model, "b" * 32)
    both = preferences(160, ("261109", "261110", "261116", "261117"))
    second = trained(POINTWISE, store, given, characters, both, tiny_model, "c" * 32, before=first)
    matrix = {(c["model"], c["batch"]): c["n"] for c in second.json("report")["matrix"]}
    assert {model for model, _ in matrix} == {"RM_261109", "RM_261117"}
    assert ("RM_261109", "261109") in matrix
    assert second.json("report")["lost_on_old_batches"][0]["n"] == 40
    table = list(csv.DictReader(second.file("table8").decode().splitlines()))
    assert [row["model"] for row in table] == ["RM_261109", "RM_261117"]
    assert second.file("figure").startswith(b"\x89PNG")


def test_without_held_out_pairs_nothing_is_trained(
    store: Store, given: Given, characters: pa.Table, tiny_model: Path
) -> None:
    pairs = preferences(8, ("261116",))
    pairs = pairs.set_column(pairs.column_names.index("split"), "split", pa.array(["train"] * 8))
    with pytest.raises(InputError, match="8 preferences to train on and 0 held out"):
        trained(POINTWISE, store, given, characters, pairs, tiny_model, "d" * 32)


def test_pairs_of_forgotten_users_are_not_trained_on(store: Store, given: Given, characters: pa.Table) -> None:
    inputs = {
        "preferences": (given("annotate-import", {"preferences": preferences(8, ("261116",))}), "preferences"),
        "characters": (given("ingest", {"characters": characters}), "characters"),
        "before": None,
    }
    known = Inputs(inputs, {}, frozenset({"0" * 32}))
    with pytest.raises(InputError, match="0 preferences to train on and 0 held out"):
        commit(store, POINTWISE.name, POINTWISE.outputs, lambda out: POINTWISE.run(known, PreferenceConfig(), out))


def test_a_version_is_named_after_what_it_was_trained_on() -> None:
    assert version(preferences(8, ("261109", "261116"))) == "RM_261116"


def test_reviews_of_forgotten_users_are_in_no_variant(store: Store, given: Given) -> None:
    made = {"annotation_id": "a", "pair_id": "p", "batch": "261116", "mode": "static", "annotator": "x",
            "preferred": "y0", "questions": [], "at": datetime.datetime(2026, 11, 16, tzinfo=datetime.UTC)}  # fmt: skip
    rows = [made | {"annotation_id": f"a{i}", "user": user * 32} for i, user in enumerate("0f0")]
    annotations = pa.Table.from_pylist(rows, schemas.ANNOTATION)
    inputs = {
        "annotations": (given("annotate-import", {"annotations": annotations}), "annotations"),
        "tasks": (given("annotate-export", {"tasks": schemas.TASK.empty_table()}), "tasks"),
    }
    kept, _ = reviews(Inputs(inputs, {}, frozenset({"f" * 32})))
    assert kept["annotation_id"].to_pylist() == ["a0", "a2"]
