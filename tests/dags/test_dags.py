"""The DAGs are the pipeline's declarations and nothing else; what a person may type into the form is checked."""

from __future__ import annotations

import copy
import datetime
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ab_readout
import character_flywheel
import pytest
from airflow.sdk import DAG
from airflow.sdk.exceptions import AirflowSkipException, ParamValidationError
from hypothesis import given
from hypothesis import strategies as st
from launch import LAUNCHERS, StageOperator, launcher_of, stage_arguments

from flywheel_tasks.core.errors import ConfigError
from flywheel_tasks.pipeline import STAGES, load_config
from flywheel_tasks.release.due import Due

DAGS = Path(character_flywheel.__file__).parent
BOTH = (character_flywheel.dag, ab_readout.dag)
BY_NAME = {stage.name: stage for stage in STAGES}
STAGE_TASKS = {dag.dag_id: [task for task in dag.tasks if task.task_id in BY_NAME] for dag in BOTH}


def test_every_stage_is_a_task_of_exactly_one_dag():
    assert sorted(task.task_id for tasks in STAGE_TASKS.values() for task in tasks) == sorted(BY_NAME)
    assert all(BY_NAME[task.task_id].schedule == "weekly" for task in STAGE_TASKS["character_flywheel"])
    assert all(set(dag.task_ids) - set(BY_NAME) <= {"approve", "await-reviews"} for dag in BOTH)


@pytest.mark.parametrize("dag", BOTH, ids=lambda dag: dag.dag_id)
def test_edges_are_the_declared_inputs_of_the_same_cycle(dag: DAG):
    for task in STAGE_TASKS[dag.dag_id]:
        declared = {i.stage for i in BY_NAME[task.task_id].inputs.values() if not i.previous}
        waited = {"await-reviews"} if task.task_id == "annotate-import" else set()
        assert task.upstream_task_ids == declared & set(dag.task_ids) | waited


@pytest.mark.parametrize("dag", BOTH, ids=lambda dag: dag.dag_id)
def test_groups_are_the_phases(dag: DAG):
    found = {task.task_id: task.task_group.group_id for task in STAGE_TASKS[dag.dag_id]}
    assert found == {name: BY_NAME[name].phase for name in found}


@pytest.mark.parametrize("dag", BOTH, ids=lambda dag: dag.dag_id)
def test_each_task_is_documented_from_its_declaration(dag: DAG):
    for task in STAGE_TASKS[dag.dag_id]:
        stage = BY_NAME[task.task_id]
        assert task.doc_md.startswith(stage.doc)
        assert stage.doc
        assert stage.paper in task.doc_md
        assert all(f"`{stage.name}.{field}`" in task.doc_md for field in stage.config.model_fields)


def test_the_weekly_schedule():
    dag = character_flywheel.dag
    assert (dag.schedule, dag.catchup, dag.max_active_runs) == ("0 6 * * 1", False, 1)


def test_only_airflow_retries_and_a_skipped_stage_does_not_stop_the_loop():
    assert {(task.retries, task.trigger_rule) for tasks in STAGE_TASKS.values() for task in tasks} == {
        (2, "none_failed")
    }


def test_an_unknown_launcher_is_one_clear_error():
    with pytest.raises(ConfigError, match=r"FLYWHEEL_LAUNCHER='swarm': the launchers are local, docker, kubernetes$"):
        launcher_of("swarm")
    assert {launcher_of(mode).__module__ for mode in LAUNCHERS} == {f"launch_{mode}" for mode in LAUNCHERS}


def form(**typed: object) -> dict[str, object]:
    """The form filled in as typed; raises where Airflow would refuse it."""
    params = copy.deepcopy(character_flywheel.dag.params)  # resolving keeps what was typed
    merged = params.dump() | typed
    for name, value in merged.items():
        params.get_param(name).resolve(value=value)
    return merged


@pytest.mark.parametrize(
    "typed",
    [
        {},
        {"cycle": "2026-W47"},
        {"cycle": ""},
        {"overrides": ["seed=7", "ingest.logs=/data/*.jsonl", "filter.on_pii=; rm -rf /"]},
        {"skip": [STAGES[0].name]},
        {"profile": "test"},
    ],
)
def test_the_form_accepts(typed: dict[str, object]):
    form(**typed)


@pytest.mark.parametrize(
    "typed",
    [
        {"cycle": "2026-47"},
        {"cycle": "2026-W54"},
        {"cycle": "2026-W47; rm -rf /"},
        {"cycle": "../../etc"},
        {"profile": "huge"},
        {"skip": ["no-such-stage"]},
        {"overrides": ["--config=/etc/passwd"]},
        {"overrides": ["seed"]},
        {"overrides": "seed=7"},
    ],
)
def test_the_form_refuses(typed: dict[str, object]):
    with pytest.raises(ParamValidationError):
        form(**typed)


@given(st.text(), st.text())
def test_a_setting_is_one_argument_whatever_it_holds(value: str, uri: str):
    override = f"ingest.logs={value}"
    arguments = stage_arguments(
        "filter", "2026-W47", {"profile": "demo", "overrides": [override]}, {"ingest": uri, "expose": None}
    )
    head = ["run", "filter", "--cycle", "2026-W47", "--profile", "demo", "--set", override]
    assert arguments == head + (["--input", f"ingest={uri}"] if uri else [])


def run_of(logical: str | None, after: str) -> dict[str, object]:
    def parse(text: str | None) -> datetime.datetime | None:
        return datetime.datetime.fromisoformat(text) if text else None

    return {"dag_run": SimpleNamespace(logical_date=parse(logical), run_after=parse(after))}


@pytest.mark.parametrize(
    ("dag", "logical", "after", "cycle"),
    [
        (BOTH[0], "2026-11-16T06:00+00:00", "2026-11-16T06:00+00:00", "2026-W47"),
        (BOTH[0], None, "2026-11-22T23:59+00:00", "2026-W47"),
        (BOTH[0], None, "2027-01-01T00:00+00:00", "2026-W53"),
        (BOTH[1], "2026-11-16T07:00+00:00", "2026-11-16T07:00+00:00", "2026-W46"),
        (BOTH[1], "2026-11-17T07:00+00:00", "2026-11-17T07:00+00:00", "2026-W47"),
    ],
)
def test_an_empty_cycle_is_the_week_of_the_run(dag: DAG, logical: str | None, after: str, cycle: str, tmp_path: Path):
    """For the readout, where no release is open."""
    params = {"params": form(overrides=[f"store.uri={tmp_path}/store"])}
    assert dag.tasks[0].due(run_of(logical, after) | params) == (cycle, None)


def launched(monkeypatch: pytest.MonkeyPatch, day: str, **typed: object) -> dict[str, list[str]]:
    """The command lines of a run of `ab_readout`, by stage."""
    found: dict[str, list[str]] = {}

    def launch(self: StageOperator, arguments: list[str], context: object) -> str:
        found[self.stage_name] = arguments
        return "file:///m/manifest.json"

    monkeypatch.setattr(launcher_of("local"), "launch", launch)
    ti = SimpleNamespace(xcom_pull=lambda task_ids: None)
    for task in ab_readout.dag.tasks:
        context = {"params": form(**typed) | {"skip": None}, "ti": ti, **run_of(f"{day}T07:00+00:00", "")}
        type(task).execute.__wrapped__(task, context)
    return found


def test_the_daily_readout_is_told_which_day_is_complete(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Without it a last day that is still filling up could close a window; what a person typed wins."""
    typed = [f"store.uri={tmp_path}/store", "readout.as_of=2026-11-01"]
    found = launched(monkeypatch, "2026-11-17", overrides=typed)
    settings = {stage: [a for a in arguments if "=" in a] for stage, arguments in found.items()}
    assert settings == {"expose": typed, "readout": ["readout.as_of=2026-11-17", *typed]}
    found = load_config(overrides=["store.uri=/tmp/x", "readout.as_of=2026-11-17"]).stages["readout"]
    assert found.as_of == datetime.date(2026, 11, 17)


@pytest.mark.parametrize(
    ("day", "typed", "complete"),
    [
        ("2026-11-25", [], "2026-11-23"),
        ("2026-11-25", ['readout.activity=["/a/*"]'], "2026-11-25"),
        ("2026-11-23", [], "2026-11-23"),
    ],
    ids=["the ingest's days", "a platform's days", "the morning of the ingest"],
)
def test_a_daily_run_reads_the_open_release_with_the_newest_ingest(
    monkeypatch: pytest.MonkeyPatch, day: str, typed: list[str], complete: str
):
    """A day that the ingest saw in part is not complete, however late it is by now."""
    monday = datetime.datetime(2026, 11, 23, 6, tzinfo=datetime.UTC)
    ingest = SimpleNamespace(uri="file:///s/manifest.json", manifest=SimpleNamespace(started=monday))
    monkeypatch.setattr("launch.due", lambda store, settled, days: Due("2026-W47", ingest))
    found = launched(monkeypatch, day, overrides=typed)
    for arguments in found.values():
        assert arguments[arguments.index("--cycle") + 1] == "2026-W47"
        assert f"ingest={ingest.uri}" in arguments
    assert f"readout.as_of={complete}" in found["readout"]
    for arguments in launched(monkeypatch, day, overrides=typed, cycle="2026-W46").values():
        assert "2026-W46" in arguments
        assert "--input" not in arguments


def test_a_typed_cycle_trusts_no_day_that_its_ingest_saw_in_part(monkeypatch: pytest.MonkeyPatch):
    """An old week read again today: its ingest ended on a Monday morning, whatever day it is now."""
    monday = datetime.datetime(2026, 11, 16, 6, tzinfo=datetime.UTC)
    ingest = SimpleNamespace(uri="file:///s/manifest.json", manifest=SimpleNamespace(started=monday))
    known = {("2026-W46", "ingest"): ingest}
    monkeypatch.setattr("launch.Store.pointed", lambda store, cycle, stage: known.get((cycle, stage)))
    for cycle, complete in (("2026-W46", "2026-11-16"), ("2026-W45", "2026-11-25")):
        found = launched(monkeypatch, "2026-11-25", cycle=cycle)
        assert f"readout.as_of={complete}" in found["readout"]
        assert all((f"ingest={ingest.uri}" in arguments) == (cycle == "2026-W46") for arguments in found.values())


def test_a_skipped_stage_is_skipped_before_anything_is_looked_up():
    task = character_flywheel.dag.tasks[0]
    with pytest.raises(AirflowSkipException, match="later stages use"):
        type(task).execute.__wrapped__(task, {"params": {"skip": [task.task_id]}, "ti": None})


PARSE = """
import sys, time
import airflow.sdk.exceptions
from airflow.sdk import DAG, BaseOperator, Param, TaskGroup
sys.path.append(sys.argv[1])
began = time.process_time()
import character_flywheel, ab_readout
print(time.process_time() - began, *sorted({name.partition(".")[0] for name in sys.modules}))
"""
HEAVY = {
    "torch",
    "ray",
    "vllm",
    "mlflow",
    "transformers",
    "sklearn",
    "scipy",
    "faiss",
    "presidio_analyzer",
    "matplotlib",
}


def test_parsing_loads_nothing_heavy_and_takes_under_a_second():
    runs = [
        subprocess.run([sys.executable, "-c", PARSE, DAGS], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(2)
    ]
    assert not HEAVY & set(runs[0])
    assert min(float(run[0]) for run in runs) < 1.0


def test_a_run_uses_the_deployments_store_unless_a_person_names_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "deployment.yaml"
    file.write_text("store: s3://bucket/flywheel\n")
    monkeypatch.setenv("FLYWHEEL_DEPLOYMENT", str(file))
    for dag in BOTH:
        for task in dag.tasks:
            if isinstance(task, StageOperator):
                settings = task.derived_settings(run_of(None, "2026-11-22T23:59+00:00"))
                assert load_config("demo", None, settings).store.uri == "s3://bucket/flywheel"
                assert load_config("demo", None, [*settings, "store.uri=s3://mine/x"]).store.uri == "s3://mine/x"
    monkeypatch.delenv("FLYWHEEL_DEPLOYMENT")
    assert BOTH[0].tasks[0].derived_settings(run_of(None, "2026-11-22T23:59+00:00")) == []
