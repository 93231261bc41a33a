"""Runs a stage in a container of a Docker engine, or of podman behind the same API."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import deployment
from airflow.sdk.exceptions import AirflowFailException
from deployment import Deployment
from docker.api import APIClient
from docker.errors import APIError, DockerException, NotFound
from docker.types import DeviceRequest, Ulimit
from docker.types import Mount as DockerMount
from launch import printable, slots
from remote import Ended, RemoteOperator, granted, task_of
from requests import RequestException

from flywheel_tasks.core.ids import USER_KEY_VARIABLE
from flywheel_tasks.core.stage import Resources, Stage

TASK_LABEL = "flywheel.task"
KILL_AFTER_SECONDS = 3.0
"""Less than the five seconds after which Airflow kills the task's own process, and with it this one's last chance."""


class Launcher(RemoteOperator):
    custom_operator_name = "flywheel run (Docker)"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._client: APIClient | None = None
        self._container = ""

    @staticmethod
    def placement(stage: Stage) -> dict[str, Any]:
        return {**RemoteOperator.placement(stage), "pool_slots": slots(stage)}

    def run_to_end(self, arguments: Sequence[str], context: Mapping[str, Any]) -> Ended:
        settings = deployment.load()
        if (nodes := self.resources_of_stage.nodes) > 1:
            raise AirflowFailException(
                f"{self.stage_name} asks for {nodes} nodes, and a Docker engine is one machine: set "
                f"resources.{self.stage_name}.nodes to 1 in the file that ${deployment.VARIABLE} names"
            )
        try:
            client = self._client = APIClient(base_url=settings.docker.url, version="auto")
            self.clear(client, task_of(context))
            body = container(
                settings, self.resources_of_stage, arguments, self.environment(settings), {TASK_LABEL: task_of(context)}
            )
            host = client.create_host_config(**body.pop("host_config"))
            self._container = client.create_container(**body, host_config=host)["Id"]
            if self.cancelled:
                return Ended(None, "was cancelled before its container started")
            self.log.info("container %s of %s", self._container[:12], body["image"])
            stream = client.attach(self._container, stdout=True, stderr=True, stream=True)
            client.start(self._container)
            for line in lines(stream):
                self.log.info("%s", line)
            code = int(client.wait(self._container)["StatusCode"])
            state = client.inspect_container(self._container)["State"]
            return Ended(code, "ran out of memory" if state.get("OOMKilled") else "")
        except (DockerException, RequestException) as error:
            return Ended(None, f"was lost by the engine at {settings.docker.url}: {_one_line(error)}")
        finally:
            self.remove()

    def environment(self, settings: Deployment) -> dict[str, str]:
        """The deployment's variables, those it takes from the worker, and the user key only where it is used."""
        names = (*settings.docker.pass_environment, *([USER_KEY_VARIABLE] if self.uses_user_key else []))
        told = granted(self.resources_of_stage) | settings.environment
        return told | {name: os.environ[name] for name in names if name in os.environ}

    def clear(self, client: APIClient, task: str) -> None:
        """Remove what an earlier try of this task left when its worker died."""
        for left in client.containers(all=True, filters={"label": f"{TASK_LABEL}={task}"}):
            self.log.warning("removing container %s, which an earlier try left behind", left["Id"][:12])
            with contextlib.suppress(NotFound):
                client.remove_container(left["Id"], force=True, v=True)

    def remove(self) -> None:
        """Remove the container, running or not; twice does no harm."""
        if self._client is None or not self._container:
            return
        try:
            self._client.remove_container(self._container, force=True, v=True)
        except NotFound:
            return
        except (DockerException, RequestException) as error:
            self.log.warning("container %s could not be removed: %s", self._container[:12], _one_line(error))

    def on_kill(self) -> None:
        """SIGTERM now, removal soon; Airflow calls this in a signal handler, so it may not wait."""
        super().on_kill()
        if self._client is None or not self._container:
            return
        with contextlib.suppress(APIError, RequestException):  # it has ended already
            self._client.kill(self._container, "SIGTERM")
        remover = threading.Timer(KILL_AFTER_SECONDS, self.remove)
        remover.daemon = True
        remover.start()


def container(
    settings: Deployment,
    wanted: Resources,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    labels: Mapping[str, str],
) -> dict[str, Any]:
    """The container of one stage, as Docker's API takes it."""
    memory = int(wanted.memory_gib * 2**30)
    return {
        "image": settings.image_for(wanted.gpus),
        "command": list(arguments),
        "environment": dict(environment),
        "labels": dict(labels),
        "user": settings.docker.user,
        "host_config": {
            "network_mode": settings.docker.network,
            "mounts": [
                DockerMount(
                    m.target, m.source, type="bind" if m.source.startswith("/") else "volume", read_only=m.read_only
                )
                for m in settings.docker.mounts
            ],
            "nano_cpus": int(wanted.cpus * 1e9),
            "mem_limit": memory,
            "memswap_limit": memory,
            "shm_size": memory // 2,
            "device_requests": [DeviceRequest(count=wanted.gpus, capabilities=[["gpu"]])] if wanted.gpus else None,
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges"],
            "ulimits": [Ulimit(name=name, soft=n, hard=n) for name, n in settings.docker.ulimits.items()] or None,
        },
    }


def lines(stream: Iterable[bytes]) -> Iterator[str]:
    """The chunks of a log as printable lines."""
    rest = b""
    for chunk in stream:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from map(printable, whole)
    if rest:
        yield printable(rest)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
