"""A stage run: the same work is done once, inputs are resolved or named, and rows are accounted for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pytest
from pydantic import Field

from flywheel_tasks.core import runner, schemas, storage
from flywheel_tasks.core.config import FlywheelConfig, Operational
from flywheel_tasks.core.errors import CorruptArtifact, FlywheelError, InputError
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.runner import Result, find_stage, run_stage
from flywheel_tasks.core.stage import Input, Inputs
from flywheel_tasks.core.store import Store
from tests.drills.stages import CYCLE, FIRST, SECOND, DrillConfig, config_for


@pytest.fixture
def config(tmp_path: Path) -> FlywheelConfig:
    settings = config_for(str(tmp_path / "store"))
    return settings.model_copy(
        update={"tracking": settings.tracking.model_copy(update={"uri": f"sqlite:///{tmp_path}/mlflow.db"})}
    )


@pytest.fixture
def store(config: FlywheelConfig) -> Store:
    return Store(config.store.uri)


def run(stage: object, config: FlywheelConfig, cycle: str = CYCLE, **given: str) -> Result:
    return run_stage(stage, cycle, config, Store(config.store.uri), given)  # type: ignore[arg-type]


def test_the_same_work_is_never_done_twice(config: FlywheelConfig) -> None:
    made, again, next_week = run(FIRST, config), run(FIRST, config), run(FIRST, config, "2026-W48")
    assert [made.outcome, again.outcome, next_week.outcome] == ["made", "cached", "cached"]
    assert made.artifact.uri == again.artifact.uri == next_week.artifact.uri


def test_what_a_run_would_find_is_told_without_running(config: FlywheelConfig, store: Store) -> None:
    assert find_stage(FIRST, CYCLE, config, store) is None
    assert (store.cycles(), store.storage.list("artifacts")) == ([], [])
    made = run(FIRST, config).artifact
    later = "2026-W48"
    found = find_stage(FIRST, later, config, store)
    assert found is not None
    assert (found.uri, store.pointed(later, FIRST.name)) == (made.uri, None)
    assert find_stage(SECOND, later, config, store, {FIRST.name: made.uri}) is None
    assert find_stage(FIRST, later, config.model_copy(update={"seed": 99}), store) is None


def test_what_decides_the_content_decides_the_key(config: FlywheelConfig) -> None:
    keys = {run(FIRST, config).artifact.manifest.key}
    keys.add(run(FIRST, config.model_copy(update={"seed": 99})).artifact.manifest.key)
    keys.add(run(replace(FIRST, uses_cycle=True), config).artifact.manifest.key)
    keys.add(run(replace(FIRST, uses_cycle=True), config, "2026-W48").artifact.manifest.key)
    assert len(keys) == 4


def test_a_missing_input_names_the_stage_and_the_command(config: FlywheelConfig) -> None:
    with pytest.raises(
        InputError, match=r"needs 'activity' from drill-first.*flywheel run drill-first --cycle 2026-W47"
    ):
        run(SECOND, config)


def test_an_optional_input_may_be_absent_and_enters_the_key_when_there(config: FlywheelConfig) -> None:
    def look(inputs: Inputs, _: object, out: Output) -> None:
        out.json("report", {"there": inputs.get("activity") is not None})

    stage = replace(
        SECOND,
        run=look,
        inputs={"activity": Input("drill-first", "activity", optional=True)},
        outputs={"report": "json"},
    )
    without = run(stage, config).artifact
    run(FIRST, config)
    with_it = run(stage, config).artifact
    assert (without.json("report"), with_it.json("report")) == ({"there": False}, {"there": True})
    assert without.manifest.key != with_it.manifest.key


def test_previous_means_the_newest_earlier_cycle(config: FlywheelConfig) -> None:
    stage = replace(SECOND, inputs={"activity": Input("drill-first", "activity", previous=True)})
    with pytest.raises(InputError, match="an earlier cycle"):
        run(stage, config)
    old = run(FIRST, config, "2026-W45").artifact.manifest.key
    newer = run(FIRST, config.model_copy(update={"seed": 5}), "2026-W46").artifact.manifest.key
    run(FIRST, config.model_copy(update={"seed": 6}), "2026-W48")
    found = run(stage, config).artifact.manifest.inputs["activity"].key
    assert found == newer != old


def test_a_given_uri_must_be_a_manifest_of_this_store_and_of_the_right_stage(
    config: FlywheelConfig, tmp_path: Path
) -> None:
    uri = run(FIRST, config).artifact.uri
    assert run(SECOND, config, **{"drill-first": uri}).outcome == "made"
    other = run(SECOND, config).artifact.uri
    for bad in (
        other,
        uri.replace("artifacts", "../artifacts"),
        "file:///etc/passwd",
        uri + "/../../x",
        f"file://{tmp_path}",
    ):
        with pytest.raises(InputError):
            run(SECOND, config, **{"drill-first": bad})
    with pytest.raises(InputError, match="does not read it"):
        run(SECOND, config, ingest=uri)


@pytest.mark.parametrize("lost", [1, -1])
def test_rows_that_vanish_or_appear_stop_the_commit(config: FlywheelConfig, store: Store, lost: int) -> None:
    def leaky(inputs: Inputs, _: object, out: Output) -> None:
        out.account("unit", rows_in=10, rows_out=10 - lost)

    stage = replace(FIRST, run=leaky, outputs={"activity": "activity"})
    with pytest.raises(FlywheelError, match="rows are lost"):
        run(stage, config)
    assert list(store.artifacts()) == []


def test_a_rejected_row_must_be_in_quarantine(config: FlywheelConfig) -> None:
    def silent(inputs: Inputs, _: object, out: Output) -> None:
        out.count_reasons({"too long": 1})
        out.account("unit", rows_in=1, rows_out=0)

    with pytest.raises(FlywheelError, match="1 rows were rejected, but 0 are in quarantine"):
        run(replace(FIRST, run=silent, outputs={"activity": "activity"}), config)


@pytest.mark.parametrize(
    ("table", "named"),
    [
        (pa.table({"unit_id": ["a"], "day": ["x"], "sends": [1]}), "types"),
        (pa.table({"unit_id": ["a"], "sends": [1]}), "missing day"),
        (
            pa.table({"unit_id": pa.array([None], pa.string()), "day": pa.array([1], pa.date32()), "sends": [1]}),
            "'unit_id' has 1 nulls",
        ),
        (pa.table({"unit_id": ["a"], "day": pa.array([1], pa.date32()), "sends": [1], "who": ["a"]}), "unknown who"),
    ],
)
def test_an_output_that_breaks_its_schema_is_refused(config: FlywheelConfig, table: pa.Table, named: str) -> None:
    def wrong(inputs: Inputs, _: object, out: Output) -> None:
        with out.table("activity") as writer:
            writer.write(table)

    with pytest.raises(InputError, match=named):
        run(replace(FIRST, run=wrong, outputs={"activity": "activity"}), config)


def test_a_failed_attempt_leaves_no_files(config: FlywheelConfig, tmp_path: Path) -> None:
    def fails(inputs: Inputs, _: object, out: Output) -> None:
        with out.table("activity") as writer:
            writer.write(schemas.ACTIVITY.empty_table())
        raise FlywheelError("the reactor is cold")

    with pytest.raises(FlywheelError, match="the reactor is cold"):
        run(replace(FIRST, run=fails), config)
    assert [p for p in (tmp_path / "store" / "artifacts").rglob("*") if p.is_file()] == []


def test_a_manifest_records_where_everything_came_from(config: FlywheelConfig) -> None:
    run(FIRST, config)
    manifest = run(SECOND, config).artifact.manifest
    assert manifest.inputs["activity"].stage == "drill-first"
    assert manifest.environment["pyarrow"] == pa.__version__
    assert manifest.started <= manifest.finished
    assert manifest.rows is not None
    assert manifest.rows.rows_in == manifest.rows.rows_out == 600


def test_a_table_written_under_another_schema_is_refused(
    config: FlywheelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = run(FIRST, config).artifact.table("activity")
    reader.schema = schemas.EXPOSURE
    with pytest.raises(CorruptArtifact, match="does not have the schema"):
        reader.read()


class Modelled(DrillConfig):
    model: str = ""


def test_other_weights_at_the_same_path_make_another_artifact(config: FlywheelConfig, tmp_path: Path) -> None:
    stage = replace(FIRST, config=Modelled, models=("model",))
    folder = tmp_path / "model"
    folder.mkdir()
    keys = []
    for weights in (b"one", b"two", b"one"):
        (folder / "weights.safetensors").write_bytes(weights)
        settings = config.model_copy(update={"stages": {FIRST.name: Modelled(model=str(folder))}})
        keys.append(run(stage, settings).artifact.manifest.key)
    assert keys[0] == keys[2] != keys[1]
    missing = config.model_copy(update={"stages": {FIRST.name: Modelled(model="package:no-such-package")}})
    with pytest.raises(InputError, match="no-such-package"):
        run(stage, missing)


def test_weights_decide_the_key_however_their_folder_is_written(
    config: FlywheelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    stage = replace(FIRST, config=Modelled, models=("model",))
    (tmp_path / "model").mkdir()
    for path in ("~/model", f"file://{tmp_path}/model", f"{tmp_path}/model"):
        settings = config.model_copy(update={"stages": {FIRST.name: Modelled(model=path)}})
        keys = set()
        for weights in (b"one", b"two"):
            (tmp_path / "model" / "weights.safetensors").write_bytes(weights)
            keys.add(run(stage, settings).artifact.manifest.key)
        assert len(keys) == 2, path


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/no/such/folder", "there is no model at"),
        ("~/no-such-folder", "there is no model at"),
        ("file:///no/such/folder", "there is no model at"),
        ("s3://bucket/models/large", "is not STORE/artifacts/STAGE/KEY"),
    ],
)
def test_a_model_whose_weights_cannot_be_told_is_refused_before_the_work(
    config: FlywheelConfig, path: str, why: str
) -> None:
    stage = replace(FIRST, config=Modelled, models=("model",))
    with pytest.raises(InputError, match=f"drill-first.model: .*{why}"):
        run(stage, config.model_copy(update={"stages": {FIRST.name: Modelled(model=path)}}))


@pytest.mark.parametrize("model", ["", "a-name-at-an-endpoint", f"s3://bucket/artifacts/rl/{'0' * 32}/model"])
def test_a_name_at_an_endpoint_and_a_checkpoint_speak_for_themselves(config: FlywheelConfig, model: str) -> None:
    stage = replace(FIRST, config=Modelled, models=("model",))
    assert run(stage, config.model_copy(update={"stages": {FIRST.name: Modelled(model=model)}})).outcome == "made"


class Sourced(DrillConfig):
    logs: tuple[str, ...] = Field((), json_schema_extra=Operational)
    cards: tuple[str, ...] = Field((), json_schema_extra=Operational)


def test_the_same_files_in_other_fields_make_another_artifact(config: FlywheelConfig, tmp_path: Path) -> None:
    stage = replace(FIRST, config=Sourced, sources=("logs", "cards"), may_be_empty=("logs", "cards"))
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(name)
    both, a, b = (f"{tmp_path}/{name}.jsonl" for name in "*ab")
    keys = set()
    for logs, cards in (((both,), ()), ((a,), (b,)), ((b,), (a,)), ((), (both,))):
        settings = config.model_copy(update={"stages": {FIRST.name: Sourced(logs=logs, cards=cards)}})
        keys.add(run(stage, settings).artifact.manifest.key)
    assert len(keys) == 4


FILES = ("a.gz", "x/b.gz", "x/y/c.gz", "x/y/d.txt", ".hidden.gz", ".git/e.gz")


@pytest.mark.parametrize("pattern", ["**/*.gz", "*.gz", "x/*/*.gz", "x/**", "x/**/c.gz", "[ax].gz", "?/b.gz", ".*.gz"])
def test_a_glob_means_the_same_far_away_as_here(tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FILES:
        (tmp_path / "bucket" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "bucket" / name).write_bytes(b"")

    def far(uri: str) -> tuple[pafs.FileSystem, str]:
        """Buckets that lie in the folder."""
        return pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), uri.removeprefix("s3://")

    monkeypatch.setattr(runner, "external", far)
    here = {path.removeprefix(f"{tmp_path}/bucket/") for path in runner.expand(f"{tmp_path}/bucket/{pattern}")}
    assert {path.removeprefix("s3://bucket/") for path in runner.expand(f"s3://bucket/{pattern}")} == here != set()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_never_committed(config: FlywheelConfig, store: Store, value: float) -> None:
    def diverged(inputs: Inputs, settings: object, out: Output) -> None:
        out.metric("loss", value)
        FIRST.run(inputs, settings, out)

    with pytest.raises(FlywheelError, match="metric 'loss'"):
        run(replace(FIRST, run=diverged), config)
    assert list(store.artifacts()) == []


def test_another_contract_is_another_artifact(config: FlywheelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run(FIRST, config).artifact.manifest.key
    wider = schemas.ACTIVITY.append(pa.field("note", pa.string()))
    monkeypatch.setitem(schemas.SCHEMAS, "activity", wider)

    def noted(inputs: Inputs, settings: object, out: Output) -> None:
        with out.table("activity") as writer:
            writer.write(wider.empty_table())
        for name in ("report", "plot"):
            (out.folder(name) / "x").write_text("x")
        (out.folder("model") / "x").write_text("x")
        out.account("unit", 0, 0)

    assert run(replace(FIRST, run=noted), config).artifact.manifest.key != before


def test_a_stray_file_beside_the_artifacts_disturbs_nobody(
    config: FlywheelConfig, store: Store, tmp_path: Path
) -> None:
    run(FIRST, config)
    (tmp_path / "store" / "artifacts" / ".DS_Store").write_bytes(b"")
    (tmp_path / "store" / "artifacts" / "drill-first" / ".snapshot").mkdir()
    assert len(list(store.artifacts())) == 1


def test_what_a_folder_of_the_store_lists_enters_the_key(tmp_path: Path) -> None:
    config = config_for(str(tmp_path / "store"))
    store = Store(config.store.uri)
    stage = replace(FIRST, state=("champion/ledger",))
    keys = []
    for entry in (None, "000001.json"):
        if entry:
            store.storage.put(f"champion/ledger/{entry}", b"{}")
        keys.append(run_stage(stage, CYCLE, config, store).artifact.manifest.key)
    assert keys[0] != keys[1] == run_stage(stage, CYCLE, config, store).artifact.manifest.key


@pytest.mark.parametrize(("changed", "said"), [("", "abc"), (" M flywheel_tasks/cli.py", "abc-dirty")])
def test_a_commit_is_not_claimed_for_code_that_was_changed(
    monkeypatch: pytest.MonkeyPatch, changed: str, said: str
) -> None:
    monkeypatch.delenv("FLYWHEEL_COMMIT", raising=False)
    monkeypatch.setattr(runner, "_git", lambda folder, verb, *rest: "abc" if verb == "rev-parse" else changed)
    assert runner._commit.__wrapped__() == said


def test_a_network_that_is_down_is_not_called_a_wrong_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    class Down:
        @staticmethod
        def from_uri(uri: str) -> None:
            raise OSError("When resolving region: curlCode: 6, Couldn't resolve host name")

    monkeypatch.setattr(storage.pafs, "FileSystem", Down)
    with pytest.raises(InputError, match=r"cannot be reached.*check the network"):
        storage.external("s3://bucket/logs")
