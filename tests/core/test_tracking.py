"""MLflow tells the story: a run per attempt under its cycle, checkpoints by reference; and it may be down."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from flywheel_tasks.core import tracking
from flywheel_tasks.core.config import FlywheelConfig, TrackingConfig
from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.runner import run_stage
from flywheel_tasks.core.stage import Input, Inputs
from flywheel_tasks.core.store import Store
from flywheel_tasks.core.tracking import EXPERIMENT
from tests.drills.stages import CYCLE, FIRST, SECOND, config_for


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> FlywheelConfig:
    folder = tmp_path_factory.mktemp("tracked")
    config = config_for(str(folder / "store"))
    return config.model_copy(update={"tracking": TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db")})


@pytest.fixture(scope="module")
def client(tracked: FlywheelConfig) -> MlflowClient:
    store = Store(tracked.store.uri)

    def curve(inputs: Inputs, config: object, out: Output) -> None:
        FIRST.run(inputs, config, out)
        for step in range(5):
            out.metric("loss", 1.0 / (step + 1), step)

    def fails(inputs: Inputs, config: object, out: Output) -> None:
        raise FlywheelError("out of luck")

    run_stage(replace(FIRST, run=curve), CYCLE, tracked, store)
    run_stage(SECOND, CYCLE, tracked, store)
    stages = tracked.stages | {TUNED.name: tracked.stages["drill-second"]}
    run_stage(TUNED, CYCLE, tracked.model_copy(update={"stages": stages}), store)
    with pytest.raises(FlywheelError):
        run_stage(replace(FIRST, run=fails, name="drill-second"), CYCLE, tracked, store)
    return MlflowClient(tracking_uri=tracked.tracking.uri)


def tune(inputs: Inputs, config: object, out: Output) -> None:
    """A checkpoint that was made from another one."""
    assert inputs.artifact("base")
    (out.folder("model") / "config.json").write_text("{}")


TUNED = replace(
    SECOND,
    name="drill-third",
    run=tune,
    inputs={"base": Input("drill-first", "model")},
    outputs={"model": "checkpoint"},
)


def runs(client: MlflowClient, query: str = "") -> list:
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return list(client.search_runs([experiment.experiment_id], query))


def test_one_parent_run_per_cycle_and_one_child_per_attempt(client: MlflowClient, tracked: FlywheelConfig) -> None:
    parents = runs(client, "tags.kind = 'cycle'")
    children = [run for run in runs(client) if "mlflow.parentRunId" in run.data.tags]
    assert len(parents) == 1
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parents[0].info.run_id}
    assert sorted((run.data.tags["stage"], run.info.status) for run in children) == [
        ("drill-first", "FINISHED"),
        ("drill-second", "FAILED"),
        ("drill-second", "FINISHED"),
        ("drill-third", "FINISHED"),
    ]
    tags = children[0].data.tags
    assert {"cycle", "attempt", "artifact_key", "artifact_uri", "git_commit"} <= set(tags)


def test_metrics_are_curves_by_global_step_and_rows_are_counted(client: MlflowClient) -> None:
    run = runs(client, "tags.stage = 'drill-first'")[0]
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, round(point.value, 3)) for point in history] == [
        (0, 1.0),
        (1, 0.5),
        (2, 0.333),
        (3, 0.25),
        (4, 0.2),
    ]
    assert (run.data.metrics["rows.in"], run.data.metrics["rows.rejected"]) == (602, 2)
    assert run.data.params["seed"] == "17"


def test_a_checkpoint_is_a_logged_model_that_holds_a_reference_not_weights(
    client: MlflowClient, tracked: FlywheelConfig
) -> None:
    experiment = client.get_experiment_by_name(EXPERIMENT)
    models = client.search_logged_models([experiment.experiment_id])
    named = {model.model_type: model for model in models}
    assert named.keys() == {"drill-first", "drill-third"}
    artifact = Store(tracked.store.uri).pointed(CYCLE, "drill-first")
    assert artifact is not None
    tags = named["drill-first"].tags
    assert tags["uri"] == artifact.uri
    assert tags["sha256"] == artifact.manifest.outputs["model"].sha256
    assert int(tags["bytes"]) > 5000
    assert tags["commit"] == artifact.manifest.commit
    later = named["drill-third"].tags
    assert later["input.base"] == f"drill-first/{artifact.manifest.key}", "what a model was made from stands beside it"
    files = [f.path for f in client.list_artifacts(runs(client, "tags.stage = 'drill-first'")[0].info.run_id)]
    assert sorted(files) == ["plot.png", "report.json"]


def test_files_keep_their_folders_and_rows_without_names_are_not_tracked(tmp_path: Path) -> None:
    def two(inputs: Inputs, config: object, out: Output) -> None:
        for number in ("0", "1"):
            for output, name in (("plot", "units.txt"), ("layout", "units.parquet")):
                (out.folder(output) / number).mkdir()
                (out.folder(output) / number / name).write_text(number)

    config = config_for(str(tmp_path / "store"))
    config = config.model_copy(update={"tracking": TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")})
    stage = replace(FIRST, run=two, outputs={"plot": "file", "layout": "derived"})
    made = run_stage(stage, CYCLE, config, Store(config.store.uri)).artifact
    assert len(made.manifest.outputs["layout"].files) == 2
    found = MlflowClient(tracking_uri=config.tracking.uri)
    run_id = runs(found, "tags.stage = 'drill-first'")[0].info.run_id
    held = [file.path for folder in ("0", "1") for file in found.list_artifacts(run_id, folder)]
    assert held == ["0/units.txt", "1/units.txt"]


def test_a_checkpoint_is_logged_once_though_the_attempt_is_sent_while_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the end of the stage and that of its record the running sender may still come by."""
    monkeypatch.setattr(tracking, "_FIRST_SEND_SECONDS", 0.01)
    monkeypatch.setattr(tracking, "_SEND_EVERY_SECONDS", 0.01)
    config = config_for(str(tmp_path / "store"))
    artifact = run_stage(FIRST, CYCLE, config, Store(config.store.uri)).artifact
    about = artifact.manifest
    record = tracking.AttemptRecord(
        CYCLE, FIRST.name, about.attempt, about.key, artifact.uri, about.commit, {}, about.finished
    )
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with tracking.Tracker(uri, Store(config.store.uri).storage).watch(record):
        while record.run_id is None:
            time.sleep(0.05)
        record.finish(artifact)
        time.sleep(1)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert len(client.search_logged_models([experiment.experiment_id])) == 1
    assert client.get_run(record.run_id).info.status == "FINISHED"


def test_tracking_that_is_down_costs_a_warning_and_is_made_up_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = config_for(str(tmp_path / "store"))
    store = Store(config.store.uri)
    down = config.model_copy(update={"tracking": TrackingConfig(uri="http://127.0.0.1:9")})
    made = run_stage(FIRST, CYCLE, down, store)
    assert made.outcome == "made"
    assert "kept in the store as tracking/pending/drill-first" in capsys.readouterr().err
    up = config.model_copy(update={"tracking": TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")})
    run_stage(SECOND, CYCLE, up, store)
    assert store.storage.list("tracking/pending") == []
    found = runs(MlflowClient(tracking_uri=up.tracking.uri))
    assert {run.data.tags.get("stage") for run in found} == {None, "drill-first", "drill-second"}
    assert len(found) == 3
