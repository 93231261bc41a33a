"""A version is measured beside those before it on the pairs that both can read, and says which it could not ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.store import Store
from flywheel_tasks.models.chat import load_tokenizer
from flywheel_tasks.models.checkpoint import save_scorer
from flywheel_tasks.models.generate import cards
from flywheel_tasks.models.heads import load_scorer
from flywheel_tasks.preherding import measure
from flywheel_tasks.preherding.preference_config import PreferenceConfig
from flywheel_tasks.preherding.preference_rm import POINTWISE
from tests.curation.curation_runs import commit
from tests.preherding.conftest import preferences


def scorer(base: Path, folder: Path, seed: int, max_tokens: int) -> Path:
    save_scorer(load_scorer(base, kind="pointwise", seed=seed, max_tokens=max_tokens), load_tokenizer(base), folder)
    return folder


def measured(
    store: Store, base: Path, characters: pa.Table, pairs: pa.Table, versions: list[dict[str, str]], max_tokens: int
) -> tuple[dict[str, Any], pa.Table]:
    found = []

    def fill(out: Output) -> None:
        scorer(base, out.folder("model"), 1, max_tokens)
        before = {"matrix": [], "versions": versions}
        config = PreferenceConfig(max_tokens=max_tokens)
        found.append(measure.run("pointwise", pairs, cards(characters), "RM_261117", before, config, out))
        out.json("report", found[0].report)

    commit(store, POINTWISE.name, POINTWISE.outputs, fill)
    return found[0].report, found[0].rejected


def test_an_earlier_version_that_reads_less_or_is_gone_does_not_end_the_run(
    store: Store, tiny_model: Path, characters: pa.Table, tmp_path: Path
) -> None:
    rows = preferences(16, ("261109", "261117")).to_pylist()
    for row in rows[:6]:
        row["chosen"] *= 30
    rows[7]["chosen"] *= 300
    rows[8]["character_id"] = "nobody"
    pairs = pa.Table.from_pylist(rows, preferences(1, ("261109",)).schema)
    versions = [
        {"version": "RM_261102", "uri": f"{store.uri}/artifacts/preference-pointwise/{'9' * 32}/model"},
        {"version": "RM_261109", "uri": str(scorer(tiny_model, tmp_path / "old", 2, 500))},
    ]
    report, rejected = measured(store, tiny_model, characters, pairs, versions, 2048)
    everything = {cell["model"]: cell["n"] for cell in report["matrix"] if cell["batch"] == "all"}
    assert everything == {"RM_261117": 14, "RM_261109": 8}
    assert [gone["version"] for gone in report["not_measured_again"]] == ["RM_261102"]
    assert [(lost["batch"], lost["n"]) for lost in report["lost_on_old_batches"]] == [("261109", 4)]
    assert report["too_long"] == 1
    reasons = {row["row_id"]: row["reason"] for row in rejected.to_pylist()}
    assert reasons == {"f7": "too_long", "f8": "unknown_character"}


def test_when_no_pair_fits_the_limit_is_named(store: Store, tiny_model: Path, characters: pa.Table) -> None:
    with pytest.raises(InputError, match=r"none of 4 held-out pairs can be measured: .* max_tokens=16: raise it"):
        measured(store, tiny_model, characters, preferences(4, ("261109",)), [], 16)
