"""A stage as a container: what the engine is asked for, and (opt-in) a real stage in its real image.

The opt-in part: FLYWHEEL_PODMAN=unix:///…/podman.sock (podman's or Docker's socket) and FLYWHEEL_IMAGE=name:tag;
`docker/prove` builds the image without a registry, starts the engine and runs it.
"""

from __future__ import annotations

import datetime as dt
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from deployment import Deployment
from docker.errors import DockerException
from launch_docker import TASK_LABEL, Launcher, container, lines

import docker
from flywheel_tasks.compute.session import CPUS_VARIABLE
from flywheel_tasks.core.stage import Resources
from flywheel_tasks.core.store import Store
from flywheel_tasks.pipeline import by_name
from flywheel_tasks.simulation.traffic import write_event_log
from tests.conftest import USER_KEY

ENGINE, IMAGE = os.environ.get("FLYWHEEL_PODMAN"), os.environ.get("FLYWHEEL_IMAGE", "")
INSIDE = 10001


def spec(settings: Deployment, resources: Resources) -> dict[str, Any]:
    return container(settings, resources, ["run", "filter"], {"A": "b"}, {TASK_LABEL: "d/r/t"})


def test_a_container_gets_what_its_stage_declares_and_no_rights():
    body = spec(Deployment(image="cpu:1", gpu_image="cuda:1"), Resources(cpus=2, memory_gib=4))
    host = body["host_config"]
    assert (body["image"], body["user"], body["command"]) == ("cpu:1", "10001:10001", ["run", "filter"])
    assert (host["nano_cpus"], host["mem_limit"], host["memswap_limit"]) == (2_000_000_000, 4 << 30, 4 << 30)
    assert (host["cap_drop"], host["security_opt"]) == (["ALL"], ["no-new-privileges"])
    assert host["device_requests"] is None


def test_a_gpu_stage_gets_its_gpus_and_the_gpu_image():
    body = spec(Deployment(image="cpu:1", gpu_image="cuda:1"), Resources(gpus=4))
    (request,) = body["host_config"]["device_requests"]
    assert (body["image"], request.count, request.capabilities) == ("cuda:1", 4, [["gpu"]])


def test_log_chunks_become_whole_printable_lines():
    assert list(lines([b"one\ntw", b"o \x1b[2J\n", b"last"])) == ["one", "two \ufffd[2J", "last"]


@pytest.mark.parametrize("uses", [True, False])
def test_secrets_reach_only_who_needs_them(
    uses: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, deploy: Callable[..., Deployment]
):
    monkeypatch.setenv("FLYWHEEL_USER_KEY", USER_KEY)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "known to the worker")
    monkeypatch.setenv("AIRFLOW__API_AUTH__JWT_SECRET", "jwt")
    settings = deploy(docker={"pass_environment": ["MLFLOW_TRACKING_PASSWORD"]})
    stage = by_name("ingest" if uses else "diversify")
    assert stage.uses_user_key is uses
    launcher = Launcher(task_id=stage.name, stage=stage, upstream=[])
    expected = {"FLYWHEEL_PROFILE", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_PASSWORD", CPUS_VARIABLE, "OMP_NUM_THREADS"}
    assert set(launcher.environment(settings)) == expected | ({"FLYWHEEL_USER_KEY"} if uses else set())


def test_an_engine_that_is_away_is_a_failure_that_another_try_may_mend(
    tmp_path: Path, deploy: Callable[..., Deployment]
):
    deploy(docker={"url": f"unix://{tmp_path}/nothing.sock"})
    with pytest.raises(AirflowException, match="nothing") as caught:
        execute(launcher(), context(tmp_path))
    assert not isinstance(caught.value, AirflowFailException)


def test_a_stage_that_spans_nodes_is_refused(tmp_path: Path, deploy: Callable[..., Deployment]):
    deploy(resources={"ingest": {"nodes": 2}})
    with pytest.raises(AirflowFailException, match=r"asks for 2 nodes.*set resources.ingest.nodes to 1"):
        execute(launcher(), context(tmp_path))


@pytest.fixture
def deploy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Deployment]:
    """Writes a deployment file and names it in the environment."""

    def write(**changes: Any) -> Deployment:
        environment = {"FLYWHEEL_PROFILE": "test", "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/store/mlflow.db"}
        body = {"image": IMAGE or "cpu:1", "environment": environment, **changes}
        file = tmp_path / "deployment.yaml"
        file.write_text(yaml.safe_dump(body))
        monkeypatch.setenv("FLYWHEEL_DEPLOYMENT", str(file))
        return Deployment.model_validate(body)

    return write


def launcher() -> Launcher:
    return Launcher(task_id="ingest", stage=by_name("ingest"), upstream=[])


def context(tmp_path: Path, *overrides: str) -> dict[str, Any]:
    ti = SimpleNamespace(dag_id="d", run_id="r", task_id=tmp_path.name, xcom_pull=lambda task_ids: None)
    params = {"cycle": "2026-W47", "profile": "test", "overrides": [f"store.uri={tmp_path}/store", *overrides]}
    return {"params": params, "ti": ti}


def execute(launcher: Launcher, context: dict[str, Any]) -> str:
    return str(type(launcher).execute.__wrapped__(launcher, context))


@pytest.fixture
def engine(
    tmp_path: Path, deploy: Callable[..., Deployment], monkeypatch: pytest.MonkeyPatch
) -> Iterator[docker.APIClient]:
    """The engine, a deployment that leads to it, and a store that the image's user may write."""
    if not ENGINE or not IMAGE:
        pytest.skip("set FLYWHEEL_PODMAN and FLYWHEEL_IMAGE, or run docker/prove")
    (tmp_path / "store").mkdir()
    write_event_log(tmp_path / "logs", users=8, days=2, seed=3, start=dt.date(2026, 11, 16))
    for path in (tmp_path, *tmp_path.rglob("*")):
        os.chown(path, INSIDE, INSIDE)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o711)
    mounts = [
        {"source": f"{tmp_path}/store", "target": f"{tmp_path}/store", "read_only": False},
        {"source": f"{tmp_path}/logs", "target": f"{tmp_path}/logs"},
    ]
    limits = {"nofile": 1024, "nproc": 1024}
    deploy(docker={"url": ENGINE, "network": "host", "mounts": mounts, "ulimits": limits})
    monkeypatch.setenv("FLYWHEEL_USER_KEY", USER_KEY)
    client = docker.APIClient(base_url=ENGINE, version="auto")
    yield client
    assert left_of(client, tmp_path) == [], "every container is gone"


def left_of(client: docker.APIClient, tmp_path: Path) -> list[Any]:
    return list(client.containers(all=True, filters={"label": f"{TASK_LABEL}=d/r/{tmp_path.name}"}))


@pytest.mark.slow
def test_a_real_stage_runs_in_its_container(engine: docker.APIClient, tmp_path: Path):
    given = context(tmp_path, f"ingest.logs={tmp_path}/logs/*")
    uri = execute(launcher(), given)
    artifact = Store(f"{tmp_path}/store").by_uri(uri)
    assert artifact.verify() > 0
    assert artifact.manifest.rows
    written = Path(uri.removeprefix("file://"))
    assert written.stat().st_uid == INSIDE, "not root"
    assert execute(launcher(), given) == uri, "a second launch finds the artifact"


@pytest.mark.slow
def test_bad_input_in_a_container_is_final(engine: docker.APIClient, tmp_path: Path):
    with pytest.raises(AirflowFailException, match="bad input"):
        execute(launcher(), context(tmp_path, "ingest.logs=/nowhere/*"))


@pytest.mark.slow
def test_a_cancelled_task_removes_its_container(engine: docker.APIClient, tmp_path: Path):
    operator = launcher()

    def cancel() -> None:
        while not (found := left_of(engine, tmp_path)) or found[0]["State"] != "running":
            time.sleep(0.2)
        operator.on_kill()

    threading.Thread(target=cancel, daemon=True).start()
    with pytest.raises(AirflowException):
        execute(operator, context(tmp_path, f"ingest.logs={tmp_path}/logs/*"))


@pytest.mark.slow
def test_a_task_cancelled_before_it_has_its_container_leaves_none(engine: docker.APIClient, tmp_path: Path):
    operator = launcher()
    operator.on_kill()
    with pytest.raises(AirflowException, match="cancelled"):
        execute(operator, context(tmp_path, f"ingest.logs={tmp_path}/logs/*"))


@pytest.mark.slow
def test_a_new_try_removes_what_a_dead_worker_left(engine: docker.APIClient, tmp_path: Path):
    body = {"image": IMAGE, "entrypoint": ["sleep", "300"], "labels": {TASK_LABEL: f"d/r/{tmp_path.name}"}}
    host = engine.create_host_config(network_mode="host")
    left = engine.create_container(**body, host_config=host)["Id"]
    execute(launcher(), context(tmp_path, f"ingest.logs={tmp_path}/logs/*"))
    with pytest.raises(DockerException):
        engine.inspect_container(left)
