"""What the launchers of other machines share: the receipt decides whether a stage has done its work."""

from __future__ import annotations

import math
import uuid
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import deployment
from airflow.sdk.exceptions import AirflowFailException
from launch import StageOperator, config_of, failure

from flywheel_tasks.compute.demand import misfit
from flywheel_tasks.compute.session import CPUS_VARIABLE
from flywheel_tasks.core import receipts
from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.core.stage import Resources, Stage
from flywheel_tasks.core.store import Store


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code where anybody knows it, and one line for a person."""

    code: int | None
    how: str = ""


class RemoteOperator(StageOperator):
    """Runs a stage where neither its output nor its exit code can be relied on."""

    def __init__(self, *, stage: Stage, **kwargs: Any) -> None:
        super().__init__(stage=stage, **kwargs)
        self.resources_of_stage = deployment.load().resources_of(stage)
        self.cancelled = False

    def launch(self, arguments: Sequence[str], context: Mapping[str, Any]) -> str:
        try:
            config = config_of(context)
            store = Store(config.store.uri)
        except FlywheelError as error:
            raise AirflowFailException(f"{self.stage_name}: {error}") from error
        if why := misfit(self.stage_name, config.stages[self.stage_name], self.resources_of_stage):
            raise AirflowFailException(f"{why}, in the file that ${deployment.VARIABLE} names")
        receipt = f"{self.stage_name}-{uuid.uuid4().hex}"
        ended = self.run_to_end([*arguments, "--set", f"store.uri={store.uri}", "--receipt", receipt], context)
        artifact = receipts.take(store, receipt)
        if artifact is None:
            raise failure(self.stage_name, ended.code, ended.how)
        if ended.code != 0:
            self.log.warning("%s after its artifact was committed: the work is done", ended.how or "it ended badly")
        return artifact.uri

    def on_kill(self) -> None:
        """Airflow calls this once, wherever the task is; what is made afterwards is taken back by who made it."""
        self.cancelled = True
        super().on_kill()

    @abstractmethod
    def run_to_end(self, arguments: Sequence[str], context: Mapping[str, Any]) -> Ended:
        """Run `flywheel` with these arguments, log what it says, and tell how it ended."""


def granted(wanted: Resources) -> dict[str, str]:
    """What tells a process how many cores it was granted: from inside it sees all those of its node."""
    cores = str(max(1, math.floor(wanted.cpus)))
    return {CPUS_VARIABLE: cores, "OMP_NUM_THREADS": cores}


def task_of(context: Mapping[str, Any]) -> str:
    """What all tries of one task have in common, so that a new one can clear away what an earlier one left."""
    ti = context["ti"]
    return f"{ti.dag_id}/{ti.run_id}/{ti.task_id}"
