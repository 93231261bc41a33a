"""Where stages run when they do not run beside Airflow: one YAML file, named by FLYWHEEL_DEPLOYMENT.

What is Kubernetes' own (volumes, node selectors, tolerations, pull secrets …) is written as Kubernetes writes it, in
a pod template; secrets are named here and never held.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from flywheel_tasks.core.errors import ConfigError
from flywheel_tasks.core.stage import Resources, Stage
from flywheel_tasks.core.yaml_file import read_yaml
from flywheel_tasks.pipeline import STAGES

VARIABLE = "FLYWHEEL_DEPLOYMENT"
SECRET_NAME = re.compile(r"(KEY|SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIALS?)(_ID)?$", re.IGNORECASE)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Mount(_Section):
    source: str = Field(description="a folder of the host, or a volume's name")
    target: str
    read_only: bool = True


class Docker(_Section):
    url: str = Field("unix:///var/run/docker.sock", description="the engine's socket, Docker's or podman's")
    network: str = "bridge"
    user: str = "10001:10001"
    mounts: tuple[Mount, ...] = ()
    ulimits: dict[str, int] = {}
    pass_environment: tuple[str, ...] = Field(
        (), description="variables of the Airflow worker that stages get too, such as AWS_SECRET_ACCESS_KEY"
    )


class SecretKey(_Section):
    name: str
    key: str


class Kubernetes(_Section):
    namespace: str = "flywheel"
    pod: dict[str, Any] = Field({}, description="a Pod that every stage's pod starts from; its container is 'base'")
    gpu_pod: dict[str, Any] | None = Field(None, description="the same for stages with GPUs (default: pod)")
    gpu_resource: str = "nvidia.com/gpu"
    user_key: SecretKey = SecretKey(name="flywheel-user-key", key="key")
    startup_minutes: float = Field(30, gt=0, description="how long a pod may take to start on its node, image included")


class Ray(_Section):
    address: str = Field("http://127.0.0.1:8265", description="the RayCluster's Jobs API; the token is $RAY_AUTH_TOKEN")
    poll_seconds: float = Field(2, gt=0)


class Asked(_Section):
    """What a stage asks for here; what is left out stays as the stage declares it."""

    cpus: float | None = Field(None, gt=0)
    gpus: int | None = Field(None, ge=0, description="of each node")
    memory_gib: float | None = Field(None, gt=0, description="of each node")
    nodes: int | None = Field(None, ge=1, description="more than one: the stage is a job of the Ray cluster")


class Deployment(_Section):
    image: str = Field("", description="of stages without a GPU, tag or digest included")
    gpu_image: str = Field("", description="of stages with GPUs (default: image)")
    store: str = Field("", description="where artifacts live, for stages and for Airflow (empty: as the profile says)")
    environment: dict[str, str] = Field({}, description="what every stage gets; no secrets")
    settings: dict[str, Any] = Field({}, description="of stages, in every run: ingest.logs and the like")
    gpus: bool = Field(True, description="false: there are none here, and every stage runs on cores")
    resources: dict[str, Asked] = Field({}, description="by stage, where a declaration does not fit")
    deadline_hours: float = Field(48, gt=0, description="a stage that runs longer is stopped")
    docker: Docker = Docker()
    kubernetes: Kubernetes = Kubernetes()
    ray: Ray = Ray()

    @field_validator("environment")
    @classmethod
    def _no_secrets(cls, environment: dict[str, str]) -> dict[str, str]:
        for name in environment:
            if SECRET_NAME.search(name):
                raise ValueError(f"'{name}' looks like a secret: hand it over by reference (pod template, worker)")
        return environment

    @field_validator("resources")
    @classmethod
    def _known_stages(cls, resources: dict[str, Asked]) -> dict[str, Asked]:
        for name in resources.keys() - {stage.name for stage in STAGES}:
            raise ValueError(f"there is no stage '{name}': `flywheel stages` lists them")
        return resources

    def resources_of(self, stage: Stage) -> Resources:
        """What one task of the stage asks for here."""
        asked = self.resources.get(stage.name, Asked()).model_dump(exclude_none=True)
        return replace(stage.resources, **(asked | ({} if self.gpus else {"gpus": 0})))

    def image_for(self, gpus: int) -> str:
        """The image of a stage that asks for this many GPUs."""
        image = (self.gpu_image if gpus else "") or self.image
        if not image:
            raise ConfigError(f"no image for the stages: set 'image' in the file that ${VARIABLE} names")
        return image


def overrides() -> list[str]:
    """What the deployment settles for every stage, as after --set; what a person typed comes after it and wins."""
    here = load()
    settings = ({"store.uri": here.store} if here.store else {}) | here.settings
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def load() -> Deployment:
    """The deployment that the environment names, or the defaults."""
    path = os.environ.get(VARIABLE)
    if not path:
        return Deployment()
    try:
        return Deployment.model_validate(read_yaml(path, f"${VARIABLE}"))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise ConfigError(f"{path}: '{key}': {problem['msg'].removeprefix('Value error, ')}") from None
