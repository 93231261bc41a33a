"""A stage as a pod: what the cluster is asked for, what decides success, and that no pod outlives its task."""

from __future__ import annotations

import datetime as dt
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes_validate
import pytest
from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.providers.cncf.kubernetes.utils.pod_manager import PodManager
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from kubernetes.client import ApiClient
from launch import LONGEST_LINE
from launch_kubernetes import Launcher
from launch_ray import Launcher as RayLauncher
from structlog.testing import capture_logs
from tenacity import wait_none

from flywheel_tasks.core.errors import ConfigError
from flywheel_tasks.core.stage import Resources, Stage
from flywheel_tasks.core.store import Store
from flywheel_tasks.pipeline import STAGES, by_name
from flywheel_tasks.simulation.traffic import write_event_log
from tests.conftest import USER_KEY
from tests.dags import kube_api

DEPLOYMENT = """
image: registry.example/flywheel-tasks:1
gpu_image: registry.example/flywheel-tasks:1-cuda
environment: {FLYWHEEL_PROFILE: test, MLFLOW_TRACKING_URI: "sqlite:////HOME/mlflow.db"}
kubernetes:
  pod:
    spec:
      serviceAccountName: flywheel-stage
      containers: [{name: base, envFrom: [{secretRef: {name: flywheel-store}}]}]
      nodeSelector: {pool: cpu}
  gpu_pod:
    spec:
      serviceAccountName: flywheel-stage
      containers: [{name: base, volumeMounts: [{name: models, mountPath: /models, readOnly: true}]}]
      volumes: [{name: models, persistentVolumeClaim: {claimName: models, readOnly: true}}]
      nodeSelector: {pool: gpu}
      tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]
"""


@pytest.fixture(autouse=True)
def deployment_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "deployment.yaml"
    file.write_text(DEPLOYMENT.replace("/HOME", str(tmp_path)))
    monkeypatch.setenv("FLYWHEEL_DEPLOYMENT", str(file))
    return file


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[kube_api.Cluster]:
    folder = tmp_path / "cluster"
    folder.mkdir()
    with kube_api.serve(folder, {"flywheel-user-key/key": USER_KEY}) as (cluster, config):
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(config))
        yield cluster


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logs")
    write_event_log(folder, users=8, days=2, seed=3, start=dt.date(2026, 11, 16))
    return folder


def operator(stage: Stage) -> Launcher:
    return Launcher(task_id=stage.name, stage=stage, upstream=[])


def context(tmp_path: Path, *overrides: str, try_number: int = 1, run: str = "manual") -> dict[str, Any]:
    ti = SimpleNamespace(
        dag_id="character_flywheel",
        task_id="ingest",
        run_id=run,
        map_index=-1,
        try_number=try_number,
        xcom_pull=lambda task_ids: None,
        xcom_push=lambda key, value: None,
    )
    params = {"cycle": "2026-W47", "profile": "test", "overrides": [f"store.uri={tmp_path}/store", *overrides]}
    run_ = SimpleNamespace(run_id=run, logical_date=None, conf={}, run_type="manual")
    return {
        "params": params,
        "ti": ti,
        "dag": SimpleNamespace(dag_id=ti.dag_id, parent_dag=None),
        "run_id": run,
        "dag_run": run_,
    }


def execute(launcher: Launcher, context: dict[str, Any]) -> str:
    return str(type(launcher).execute.__wrapped__(launcher, context))


def pod_of(stage: Stage) -> dict[str, Any]:
    launcher = operator(stage)
    launcher.arguments = ["run", stage.name]
    pod: dict[str, Any] = ApiClient().sanitize_for_serialization(launcher.build_pod_request_obj(dry_run=True))
    return pod


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_the_pod_of_every_stage_is_what_kubernetes_accepts(stage: Stage):
    kubernetes_validate.validate(pod_of(stage), "1.33", strict=True)


GPU = Stage(**{**vars(by_name("filter")), "resources": Resources(cpus=8, gpus=4, memory_gib=64)})


def test_a_gpu_stage_asks_for_its_gpus_and_goes_where_they_are():
    spec = pod_of(GPU)["spec"]
    base = spec["containers"][0]
    assert base["image"].endswith("-cuda")
    assert base["resources"] == {
        "requests": {"cpu": "8000m", "memory": "65536Mi", "nvidia.com/gpu": "4"},
        "limits": {"memory": "65536Mi", "nvidia.com/gpu": "4"},
    }
    assert spec["nodeSelector"] == {"pool": "gpu"}
    assert spec["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert {"name": "models", "mountPath": "/models", "readOnly": True} in base["volumeMounts"]


@pytest.mark.parametrize("stage", [*STAGES, GPU], ids=lambda stage: stage.name)
def test_no_pod_runs_as_root_holds_a_secret_or_lasts_for_ever(stage: Stage):
    pod = pod_of(stage)
    spec, base = pod["spec"], pod["spec"]["containers"][0]
    assert len(spec["containers"]) == 1, "no sidecar keeps a pod alive"
    assert (spec["restartPolicy"], spec["automountServiceAccountToken"]) == ("Never", False)
    assert spec["activeDeadlineSeconds"] > 48 * 3600
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert base["securityContext"]["readOnlyRootFilesystem"] is True
    assert base["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    variables = {variable["name"]: variable for variable in base["env"]}
    assert ("FLYWHEEL_USER_KEY" in variables) is stage.uses_user_key
    assert all("valueFrom" in held for name, held in variables.items() if "KEY" in name)


def test_a_stage_that_spans_nodes_goes_to_the_ray_cluster():
    fields = {**vars(by_name("filter")), "uses_user_key": False, "resources": Resources(gpus=8, nodes=4)}
    assert Launcher.for_stage(Stage(**fields)) is RayLauncher
    assert Launcher.for_stage(GPU) is Launcher
    with pytest.raises(ConfigError, match="user key"):
        RayLauncher(task_id="x", stage=Stage(**(fields | {"uses_user_key": True})), upstream=[])


def test_a_real_stage_runs_in_its_pod_and_its_manifest_comes_back(
    cluster: kube_api.Cluster, tmp_path: Path, logs: Path
):
    launcher = operator(by_name("ingest"))
    with capture_logs() as said:
        uri = execute(launcher, context(tmp_path, f"ingest.logs={logs}/*"))
    artifact = Store(f"{tmp_path}/store").by_uri(uri)
    assert artifact.manifest.rows is not None
    assert artifact.verify() > 0
    assert cluster.pods == {}, "the pod is gone"
    assert launcher.do_xcom_push is True
    assert any("conversations" in str(entry["event"]) or "out" in str(entry["event"]) for entry in said)
    assert list((tmp_path / "store" / "receipts").iterdir()) == []


@pytest.mark.slow
def test_the_manifest_decides_not_the_pods_phase(cluster: kube_api.Cluster, tmp_path: Path, logs: Path):
    """The work was committed, then the node ran out of memory: nothing is done again."""
    cluster.end_as = "OOMKilled"
    uri = execute(operator(by_name("ingest")), context(tmp_path, f"ingest.logs={logs}/*"))
    assert Store(f"{tmp_path}/store").by_uri(uri).manifest.stage == "ingest"


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("raise SystemExit(2)", AirflowFailException, "bad input"),
        ("raise SystemExit(1)", AirflowException, "exit code 1"),
        ("import os; os.kill(os.getpid(), 9)", AirflowException, "exit code 137"),
        ("print('file:///store/artifacts/ingest/abc/manifest.json')", AirflowFailException, "left no manifest"),
    ],
)
def test_failures(cluster: kube_api.Cluster, tmp_path: Path, script: str, error: type[Exception], message: str):
    cluster.command = ("python3", "-c", script)
    with pytest.raises(error, match=message) as caught:
        execute(operator(by_name("ingest")), context(tmp_path))
    assert type(caught.value) is error, "only a failure that another try may mend is tried again"
    assert cluster.pods == {}


def test_a_pod_the_cluster_killed_says_why(cluster: kube_api.Cluster, tmp_path: Path):
    cluster.command, cluster.end_as = ("python3", "-c", "pass"), "OOMKilled"
    with pytest.raises(AirflowException, match="OOMKilled"):
        execute(operator(by_name("ingest")), context(tmp_path))


def test_a_cancelled_task_deletes_its_pod(cluster: kube_api.Cluster, tmp_path: Path):
    cluster.command = ("python3", "-c", "import time; time.sleep(60)")
    launcher = operator(by_name("ingest"))

    def cancel() -> None:
        while not cluster.processes or launcher.pod is None:
            time.sleep(0.05)
        launcher.on_kill()

    threading.Thread(target=cancel, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(AirflowException):
        execute(launcher, context(tmp_path))
    assert time.monotonic() - began < 30
    assert cluster.pods == {}
    assert cluster.processes == {}


@pytest.mark.parametrize("moment", ["before", "while it is made"])
def test_a_task_cancelled_before_it_has_its_pod_leaves_none(
    cluster: kube_api.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
):
    """Airflow calls on_kill in a signal handler and goes on: the work between has no pod to delete yet."""
    cluster.command = ("python3", "-c", "import time; time.sleep(60)")
    launcher = operator(by_name("ingest"))
    if moment == "before":
        launcher.on_kill()
    else:
        make = cluster.create

        def create(pod: dict[str, Any]) -> dict[str, Any]:
            launcher.on_kill()
            return make(pod)

        monkeypatch.setattr(cluster, "create", create)
    with pytest.raises(AirflowException, match="cancelled"):
        execute(launcher, context(tmp_path))
    assert len(cluster.created) == (moment != "before")
    assert cluster.pods == {}
    assert cluster.processes == {}


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("lost", ["answers_creation", "lists_created"])
def test_a_pod_that_was_made_unheard_is_deleted(
    cluster: kube_api.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str, cancelled: bool
):
    """The server makes the pod and its answer is lost: nobody holds the pod, and it may not hold its GPUs."""
    for call in (PodManager.create_pod, KubernetesPodOperator.find_pod):
        if hasattr(call, "retry"):
            monkeypatch.setattr(call.retry, "wait", wait_none())
    cluster.command = ("python3", "-c", "import time; time.sleep(60)")
    setattr(cluster, lost, False)
    launcher = operator(by_name("ingest"))
    if cancelled:
        make = cluster.create
        monkeypatch.setattr(cluster, "create", lambda pod: (make(pod), launcher.on_kill())[0])
    with pytest.raises(AirflowException, match=r"lost by the cluster|cancelled"):
        execute(launcher, context(tmp_path))
    assert len(cluster.created) == 1
    assert cluster.pods == {}
    assert cluster.processes == {}


def test_a_pod_may_wait_for_the_gpus_of_another_stage_as_long_as_a_stage_may_run():
    launcher = operator(GPU)
    assert launcher.schedule_timeout_seconds == 48 * 3600
    assert launcher.startup_timeout_seconds == 30 * 60


def test_a_pods_log_can_neither_move_the_cursor_nor_fill_the_disk(cluster: kube_api.Cluster, tmp_path: Path):
    cluster.command = ("python3", "-c", "print('\x1b[2Jcleared'); print('x' * 100_000); raise SystemExit(1)")
    with pytest.raises(AirflowException, match="exit code 1"), capture_logs() as said:
        execute(operator(by_name("ingest")), context(tmp_path))
    lines = [str(entry["event"]) for entry in said]
    assert any(line.endswith("[2Jcleared") and "\x1b" not in line for line in lines)
    assert max(map(len, lines)) < 2 * LONGEST_LINE


def test_a_pod_is_told_how_many_cores_it_was_granted():
    told = {variable["name"]: variable.get("value") for variable in pod_of(GPU)["spec"]["containers"][0]["env"]}
    assert (told["FLYWHEEL_CPUS"], told["OMP_NUM_THREADS"]) == ("8", "8")


def test_a_new_try_deletes_the_pod_of_a_worker_that_died_and_no_other(cluster: kube_api.Cluster, tmp_path: Path):
    cluster.command = ("python3", "-c", "import time; time.sleep(60)")
    for run in ("manual", "another"):
        died = operator(by_name("ingest"))
        died.arguments = []
        died.pod_manager.create_pod(died.build_pod_request_obj(context(tmp_path, run=run)))
    left, other = cluster.pods
    cluster.command = ("python3", "-c", "raise SystemExit(1)")
    with pytest.raises(AirflowException, match="exit code 1"):
        execute(operator(by_name("ingest")), context(tmp_path, try_number=2))
    assert list(cluster.pods) == [other]
    assert left not in cluster.processes


def test_hostile_settings_arrive_as_text(cluster: kube_api.Cluster, tmp_path: Path):
    seen = tmp_path / "argv.json"
    script = f"import json, sys; json.dump(sys.argv[1:], open({str(seen)!r}, 'w')); raise SystemExit(1)"
    cluster.command = ("python3", "-c", script)
    typed = ["$(FLYWHEEL_USER_KEY)", "$$(HOME)", "a$", "{{ ti }}", "a\n--input=x", ";reboot"]
    hostile = [f"ingest.logs={json.dumps([text])}" for text in typed]
    with pytest.raises(AirflowException):
        execute(operator(by_name("ingest")), context(tmp_path, *hostile))
    assert [a for a in json.loads(seen.read_text()) if a.startswith("ingest.logs")] == hostile


def test_a_wrong_deployment_file_is_one_clear_error(deployment_file: Path):
    for body, message in (
        ("imagee: x", "imagee"),
        ("environment: {AWS_SECRET_ACCESS_KEY: abc}", "looks like a secret"),
        ("image: ''", "no image"),
        ("a: [", "is not YAML: line 1"),
    ):
        deployment_file.write_text(body)
        with pytest.raises(ConfigError, match=message) as caught:
            operator(by_name("ingest"))
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_two_launches_of_one_stage_at_once_give_one_artifact(cluster: kube_api.Cluster, tmp_path: Path, logs: Path):
    """Every retry is a new attempt, and overlapping attempts are harmless."""
    uris: list[str] = []

    def launch(run: str) -> None:
        uris.append(execute(operator(by_name("ingest")), context(tmp_path, f"ingest.logs={logs}/*", run=run)))

    threads = [threading.Thread(target=launch, args=(run,)) for run in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cluster.created) == 2
    assert len(uris) == 2
    assert len(set(uris)) == 1
    store = Store(f"{tmp_path}/store")
    assert [artifact.uri for artifact in store.artifacts()] == [uris[0]]
    folder = Path(uris[0].removeprefix("file://")).parent
    assert [entry.name for entry in folder.iterdir() if entry.is_dir()] == [store.by_uri(uris[0]).manifest.attempt]
