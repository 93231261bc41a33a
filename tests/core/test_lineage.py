"""What an artifact came from: its inputs, and the models that its configuration names by path."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from pydantic import Field

from flywheel_tasks.core import ids, lineage, runner
from flywheel_tasks.core.config import FlywheelConfig, ModelConfig, ModelsConfig, StageConfig, model_of
from flywheel_tasks.core.forget import forget
from flywheel_tasks.core.manifest import Manifest
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.runner import run_stage
from flywheel_tasks.core.stage import Input, Inputs
from flywheel_tasks.core.store import Store
from flywheel_tasks.release.ledger import Change, Model, append
from flywheel_tasks.release.reign import for_stage
from tests.drills.stages import FIRST, SECOND, config_for
from tests.drills.worker import NoTracker

CYCLES = ("2026-W47", "2026-W48", "2026-W49")


class Tunes(StageConfig):
    """A stage that starts from the policy, and one that samples from a pool."""

    policy: ModelConfig = model_of("policy", "where it starts")
    pool: tuple[ModelConfig, ...] = Field((), description="who answers")


def collect(inputs: Inputs, config: object, out: Output) -> None:
    users = [ids.pseudonym(user, ids.user_key()) for user in ("ann", "bob")]
    with out.table("activity") as writer:
        writer.write(pa.table({"unit_id": users, "day": [dt.date(2026, 11, 16)] * 2, "sends": [1, 1]}))
    out.account("row", rows_in=2, rows_out=2)


def train(inputs: Inputs, config: object, out: Output) -> None:
    (out.folder("model") / "model.safetensors").write_bytes(b"weights")
    (out.folder("model") / "config.json").write_text("{}")
    (out.folder("model") / "tokenizer.json").write_text("{}")


LEARNS = replace(SECOND, run=train, outputs={"model": "checkpoint"})
TUNES = replace(SECOND, name="drill-tunes", run=train, config=Tunes, inputs={}, outputs={"model": "checkpoint"},
                models=("policy", "pool"))  # fmt: skip
AFTER = replace(LEARNS, name="drill-after", inputs={"before": Input("drill-tunes", "model")})


@pytest.fixture
def config(tmp_path: Path, user_key: bytes, monkeypatch: pytest.MonkeyPatch) -> FlywheelConfig:
    """A store in which a model has learned from Ann and Bob."""
    monkeypatch.setattr(runner, "Tracker", NoTracker)
    made = config_for(str(tmp_path / "store"))
    made = made.model_copy(
        update={
            "models": ModelsConfig(policy=ModelConfig(path="package:numpy")),
            "stages": made.stages
            | {"drill-tunes": Tunes(policy=ModelConfig(path="package:numpy")), "drill-after": StageConfig()},
        }
    )
    store = Store(made.store.uri)
    run_stage(replace(FIRST, run=collect, outputs={"activity": "activity"}), CYCLES[0], made, store)
    run_stage(LEARNS, CYCLES[0], made, store)
    return made


def named(manifest: Manifest) -> str:
    return "/".join(lineage.address(manifest))


def test_who_learned_from_a_user_by_way_of_the_champion_must_retrain_too(
    config: FlywheelConfig, user_key: bytes
) -> None:
    """The next week's model is tuned from the champion, which reign names by its path; another one reads that."""
    store = Store(config.store.uri)
    first = store.pointed(CYCLES[0], "drill-second")
    assert first
    champion = Model(
        stage="drill-second", key=first.manifest.key, output="model", sha256=first.manifest.outputs["model"].sha256
    )
    append(store.storage, lambda state: Change("crown", champion, CYCLES[0], "a test", "because", "readout/x"))
    own = run_stage(TUNES, CYCLES[0], config, store).artifact.manifest
    tuned = run_stage(TUNES, CYCLES[1], for_stage(config, "drill-tunes", store, CYCLES[1]), store).artifact.manifest
    after = run_stage(AFTER, CYCLES[1], config, store).artifact.manifest
    assert tuned.inputs == {}, "only its configuration knows"
    report = forget(store, "ann", user_key)
    assert set(report["retrain_needed"]) == {named(model) for model in (first.manifest, tuned, after)}
    assert named(own) not in report["retrain_needed"], "a model that never met her"
    found = lineage.describe(store, store.get(after.stage, after.key))
    assert [entry["artifact"].split("/")[0] for entry in found["upstream"]] == [
        "drill-tunes", "drill-second", "drill-first",
    ]  # fmt: skip
    assert all(entry["retrain_needed"] for entry in found["upstream"][:2])
    below = lineage.describe(store, first)["downstream"]
    assert {entry["artifact"] for entry in below} == {named(tuned), named(after)}


@pytest.mark.parametrize(
    "path",
    [
        "{store}/artifacts/drill-second/{key}/model", "{store}/artifacts/drill-second/{key}/manifest.json",
        "{store}/artifacts/drill-second/{key}", "s3://a-copy/store/artifacts/drill-second/{key}/model",
    ],
)  # fmt: skip
def test_a_checkpoint_is_known_by_its_key_however_its_path_is_written(config: FlywheelConfig, path: str) -> None:
    store = Store(config.store.uri)
    first = store.pointed(CYCLES[0], "drill-second")
    assert first
    pool = (ModelConfig(path=path.format(store=store.uri, key=first.manifest.key)),)
    stages = config.stages | {"drill-tunes": Tunes(policy=ModelConfig(path="package:numpy"), pool=pool)}
    made = run_stage(TUNES, CYCLES[1], config.model_copy(update={"stages": stages}), store).artifact.manifest
    graph = lineage.Graph(store.artifacts())
    assert graph.upstream(lineage.address(made))[0] == lineage.address(first.manifest)
    assert lineage.address(made) in graph.downstream(lineage.address(first.manifest))


def test_another_artifact_that_is_damaged_is_named_beside_what_is_known(config: FlywheelConfig, tmp_path: Path) -> None:
    store = Store(config.store.uri)
    first = store.pointed(CYCLES[0], "drill-second")
    assert first
    stages = config.stages | {"drill-tunes": Tunes(policy=ModelConfig(path="package:numpy"))}
    other = run_stage(TUNES, CYCLES[1], config.model_copy(update={"stages": stages}), store).artifact
    whole = lineage.describe(store, first)
    (tmp_path / f"store/artifacts/drill-tunes/{other.manifest.key}/manifest.json").write_text("{}")
    found = lineage.describe(store, first)
    assert found["upstream"] == whole["upstream"]
    ((name, fault),) = found["damaged"].items()
    assert name == f"drill-tunes/{other.manifest.key}"
    assert "restore it, or delete its folder" in fault
