"""Runs a stage as a pod; a stage that spans nodes runs on the RayCluster instead."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import deployment
from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.sdk.exceptions import AirflowException
from deployment import Deployment
from kubernetes.client import (
    ApiException,
    V1Capabilities,
    V1Container,
    V1EmptyDirVolumeSource,
    V1EnvVar,
    V1EnvVarSource,
    V1ObjectMeta,
    V1Pod,
    V1PodSecurityContext,
    V1PodSpec,
    V1ResourceRequirements,
    V1SeccompProfile,
    V1SecretKeySelector,
    V1SecurityContext,
    V1Volume,
    V1VolumeMount,
)
from launch import StageOperator, printable
from launch_ray import Launcher as RayLauncher
from remote import Ended, RemoteOperator, granted
from urllib3.exceptions import HTTPError

from flywheel_tasks.core.ids import USER_KEY_VARIABLE
from flywheel_tasks.core.stage import Resources, Stage

USER = 10001
DEADLINE_SLACK_SECONDS = 600
"""Airflow stops a stage at its deadline; the cluster does it where Airflow is no longer there to."""


class Launcher(RemoteOperator, KubernetesPodOperator):
    custom_operator_name = "flywheel run (Kubernetes)"
    # Nothing is a template: what a person typed is one element of the container's arguments.
    template_fields = ()

    def __init__(self, *, stage: Stage, **kwargs: Any) -> None:
        super().__init__(stage=stage, **pod_settings(stage, deployment.load()), **kwargs)

    @classmethod
    def for_stage(cls, stage: Stage) -> type[StageOperator]:
        return RayLauncher if deployment.load().resources_of(stage).nodes > 1 else cls

    def run_to_end(self, arguments: Sequence[str], context: Mapping[str, Any]) -> Ended:
        # A kubelet would put the pod's variables, the user key among them, in place of a $(NAME) typed into the form.
        self.arguments = [text.replace("$", "$$") for text in arguments]
        try:
            self.clear(context)
            KubernetesPodOperator.execute_sync(self, context)
        except (AirflowException, ApiException, HTTPError) as error:
            return ended(self.remote_pod, error)
        finally:
            self.do_xcom_push = True  # to the pod it means a sidecar, to Airflow that the URI is passed on
            self.take_back()
        return Ended(0)

    def get_or_create_pod(self, pod_request_obj: V1Pod, context: Any) -> V1Pod:
        """A task that is cancelled while its pod is on the way makes none, or takes it back."""
        if self.cancelled:
            raise AirflowException("cancelled before its pod was made")
        self.pod = super().get_or_create_pod(pod_request_obj, context)
        if self.cancelled:
            self.pod_manager.delete_pod(self.pod)
            raise AirflowException("cancelled while its pod was made")
        return self.pod

    def take_back(self) -> None:
        """Delete the pod by the name that was asked for: where the cluster's answer was lost, nobody else knows it."""
        if self.pod_request_obj is None:
            return
        try:
            self.pod_manager.delete_pod(self.pod_request_obj)
        except (ApiException, HTTPError) as error:
            name = self.pod_request_obj.metadata.name
            self.log.warning("pod %s could not be deleted, see whether it is gone: %s", name, error)

    def clear(self, context: Mapping[str, Any]) -> None:
        """Delete the pods that earlier tries of this task left when their worker died: no GPU works for nobody."""
        selector = self._build_find_pod_label_selector(context, exclude_checked=False)
        for left in self.client.list_namespaced_pod(self.namespace, label_selector=selector).items:
            self.log.warning("deleting pod %s, which an earlier try left behind", left.metadata.name)
            self.pod_manager.delete_pod(left)


def pod_settings(stage: Stage, settings: Deployment) -> dict[str, Any]:
    """What the operator is told about a stage's pod."""
    cluster, wanted = settings.kubernetes, settings.resources_of(stage)
    return {
        "kubernetes_conn_id": None,  # Airflow's own service account, else the kubeconfig
        "namespace": cluster.namespace,
        "name": f"flywheel-{re.sub('[^a-z0-9-]', '-', stage.name)}",
        "image": settings.image_for(wanted.gpus),
        "full_pod_spec": scratch(wanted),
        "pod_template_dict": (cluster.gpu_pod if wanted.gpus and cluster.gpu_pod is not None else cluster.pod) or None,
        "container_resources": resources(wanted, cluster.gpu_resource),
        "env_vars": environment(stage, settings),
        "labels": {
            "app.kubernetes.io/name": "flywheel-stage",
            "app.kubernetes.io/part-of": "character-flywheel",
            "flywheel/stage": stage.name,
            "flywheel/phase": stage.phase,
        },
        "automount_service_account_token": False,
        "security_context": V1PodSecurityContext(
            run_as_non_root=True,
            run_as_user=USER,
            run_as_group=USER,
            fs_group=USER,
            fs_group_change_policy="OnRootMismatch",
            seccomp_profile=V1SeccompProfile(type="RuntimeDefault"),
        ),
        "container_security_context": V1SecurityContext(
            allow_privilege_escalation=False,
            capabilities=V1Capabilities(drop=["ALL"]),
            read_only_root_filesystem=True,
            run_as_non_root=True,
        ),
        "active_deadline_seconds": int(settings.deadline_hours * 3600) + DEADLINE_SLACK_SECONDS,
        # A pod that waits for another stage's GPUs has not failed.
        "schedule_timeout_seconds": int(settings.deadline_hours * 3600),
        "startup_timeout_seconds": int(cluster.startup_minutes * 60),
        "termination_grace_period": 30,
        # No sidecar: the manifest's URI comes back through the store.
        "do_xcom_push": False,
        "durable": False,
        "on_finish_action": "delete_pod",
        "on_kill_action": "delete_pod",
        "log_events_on_failure": True,
        "log_pod_spec_on_failure": False,
        "log_formatter": lambda _, line: printable(line.encode()),
        "deferrable": False,
    }


def resources(wanted: Resources, gpu: str) -> V1ResourceRequirements:
    """Requests as declared; memory and GPUs are also limits, cores may be borrowed."""
    memory = f"{int(wanted.memory_gib * 1024)}Mi"
    gpus = {gpu: str(wanted.gpus)} if wanted.gpus else {}
    return V1ResourceRequirements(
        requests={"cpu": f"{int(wanted.cpus * 1000)}m", "memory": memory} | gpus, limits={"memory": memory} | gpus
    )


def environment(stage: Stage, settings: Deployment) -> list[V1EnvVar]:
    """The deployment's variables, and the user key by reference where the stage uses it."""
    told = granted(settings.resources_of(stage)) | settings.environment
    plain = [V1EnvVar(name=name, value=value) for name, value in sorted(told.items())]
    if not stage.uses_user_key:
        return plain
    held = settings.kubernetes.user_key
    source = V1EnvVarSource(secret_key_ref=V1SecretKeySelector(name=held.name, key=held.key))
    return [*plain, V1EnvVar(name=USER_KEY_VARIABLE, value_from=source)]


def scratch(wanted: Resources) -> V1Pod:
    """The only places a stage may write beside the store: its home, /tmp, and shared memory for its workers."""
    shared = V1EmptyDirVolumeSource(medium="Memory", size_limit=f"{int(wanted.memory_gib * 512)}Mi")
    places = {"tmp": "/tmp", "home": "/home/flywheel", "shm": "/dev/shm"}  # noqa: S108
    volumes = [V1Volume(name=name, empty_dir=shared if name == "shm" else V1EmptyDirVolumeSource()) for name in places]
    mounts = [V1VolumeMount(name=name, mount_path=path) for name, path in places.items()]
    spec = V1PodSpec(containers=[V1Container(name="base", volume_mounts=mounts)], volumes=volumes)
    return V1Pod(metadata=V1ObjectMeta(), spec=spec)


def ended(pod: V1Pod | None, error: Exception) -> Ended:
    """How a pod ended, from its status where the cluster still has it."""
    status = pod.status if pod else None
    for container in (status.container_statuses if status else None) or ():
        if container.name == "base" and container.state and (over := container.state.terminated):
            named = over.reason not in (None, "Error", "Completed")
            return Ended(over.exit_code, f"was ended by the cluster: {over.reason}" if named else "")
    if status and status.reason:
        return Ended(None, f"was ended by the cluster: {status.reason}: {status.message or ''}".rstrip(": "))
    return Ended(None, f"was lost by the cluster: {' '.join(str(error).split())[:300]}")
