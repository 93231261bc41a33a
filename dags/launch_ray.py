"""Runs a stage as a job of a Ray cluster, through its Jobs API behind a token: for stages that span nodes.

Ray is not imported: the API is HTTP, and Airflow's image stays light. A job's entry point is a shell line, so every
argument is quoted; its environment can be read by whoever may read the job, so no secret goes there.
"""

from __future__ import annotations

import os
import shlex
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import deployment
import httpx
from airflow.sdk.exceptions import AirflowFailException
from launch import printable
from remote import Ended, RemoteOperator, task_of

from flywheel_tasks.core.errors import ConfigError
from flywheel_tasks.core.stage import Stage

TOKEN_VARIABLE = "RAY_AUTH_TOKEN"  # noqa: S105
OVER = ("SUCCEEDED", "FAILED", "STOPPED")
DEADLINE_SLACK_SECONDS = 600
"""Airflow stops a stage at its deadline; the job ends itself a little later."""
PATIENCE_SECONDS = 300
"""How long the cluster's head may be away before the job is given up: a head restarts in less."""
LOG_BYTES_PER_SECOND = 100_000
"""The API hands out a log whole each time, so a long one is asked for less often."""


class Launcher(RemoteOperator):
    custom_operator_name = "flywheel run (Ray job)"

    def __init__(self, *, stage: Stage, **kwargs: Any) -> None:
        super().__init__(stage=stage, **kwargs)
        if stage.uses_user_key:
            raise ConfigError(f"{stage.name} uses the user key, which never leaves for a Ray cluster: run it elsewhere")
        self._job = ""

    def run_to_end(self, arguments: Sequence[str], context: Mapping[str, Any]) -> Ended:
        settings = deployment.load()
        with client(settings.ray.address) as api:
            stop_left(api, task_of(context), self.log)
            self._job = f"flywheel-{self.stage_name}-{uuid.uuid4().hex[:12]}"
            job = {
                "entrypoint": shlex.join([*deadline(settings.deadline_hours), "flywheel", *arguments]),
                "submission_id": self._job,
                "metadata": {"task": task_of(context), "stage": self.stage_name},
                "runtime_env": {"env_vars": settings.environment},
            }
            if self.cancelled:
                return Ended(None, "was cancelled before its job was sent")
            try:
                answer = api.post("/api/jobs/", json=job)
                if answer.status_code in (401, 403):
                    raise AirflowFailException(f"{settings.ray.address} refused {TOKEN_VARIABLE}: {answer.text[:200]}")
                answer.raise_for_status()
                self.log.info("job %s on %s, %d nodes", self._job, settings.ray.address, self.resources_of_stage.nodes)
                return self.follow(api, settings.ray.poll_seconds)
            except BaseException:  # the job may run although the answer was lost
                self.on_kill()
                raise

    def follow(self, api: httpx.Client, pause: float) -> Ended:
        """Log what the job says until it is over."""
        seen, last_heard, read_again = 0, time.monotonic(), 0.0
        while True:
            try:
                job = api.get(f"/api/jobs/{self._job}").raise_for_status().json()
            except httpx.HTTPError as error:
                if time.monotonic() - last_heard > PATIENCE_SECONDS:
                    return Ended(None, f"was lost: {api.base_url} has not answered for {PATIENCE_SECONDS} s ({error})")
                time.sleep(pause)
                continue
            last_heard, over = time.monotonic(), job["status"] in OVER
            if over or last_heard >= read_again:
                seen, read_again = self.tell(api, seen, over), last_heard + max(pause, seen / LOG_BYTES_PER_SECOND)
            if over:
                return ended(job)
            if self.cancelled:
                self.stop(api)
            time.sleep(pause)

    def tell(self, api: httpx.Client, seen: int, over: bool) -> int:
        """Log what the job said after the first `seen` characters, whole lines until it is over; how much that is now.
        A log that can't be read says nothing about the job."""
        try:
            text = api.get(f"/api/jobs/{self._job}/logs").raise_for_status().json()["logs"]
        except httpx.HTTPError as error:
            self.log.warning("the log of job %s can't be read at the moment: %s", self._job, error)
            return seen
        end = len(text) if over else text.rfind("\n") + 1
        for line in text[seen:end].splitlines():
            self.log.info("%s", printable(line.encode()))
        return max(seen, end)

    def on_kill(self) -> None:
        """Ask the cluster to stop the job; Airflow calls this in a signal handler, so it may not wait long."""
        super().on_kill()
        if not self._job:
            return
        with client(deployment.load().ray.address, timeout=3) as api:
            self.stop(api)

    def stop(self, api: httpx.Client) -> None:
        try:
            api.post(f"/api/jobs/{self._job}/stop").raise_for_status()
        except httpx.HTTPError as error:
            self.log.warning("job %s could not be stopped: %s", self._job, error)


def client(address: str, timeout: float = 30) -> httpx.Client:
    """The Jobs API, with the token that it must ask for."""
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        raise AirflowFailException(f"set {TOKEN_VARIABLE} from the cluster's secret: the Jobs API runs commands")
    return httpx.Client(base_url=address, headers={"Authorization": f"Bearer {token}"}, timeout=timeout)


def stop_left(api: httpx.Client, task: str, log: Any) -> None:
    """Stop the jobs that earlier tries of this task left when their worker died."""
    found = api.get("/api/jobs/")
    if found.status_code in (401, 403):
        raise AirflowFailException(f"{api.base_url} refused {TOKEN_VARIABLE}: {found.text[:200]}")
    for job in found.raise_for_status().json():
        if (job.get("metadata") or {}).get("task") == task and job["status"] not in OVER:
            log.warning("stopping job %s, which an earlier try left behind", job["submission_id"])
            api.post(f"/api/jobs/{job['submission_id']}/stop").raise_for_status()


def deadline(hours: float) -> list[str]:
    """What ends the job where Airflow is no longer there to."""
    return ["timeout", "--kill-after=60", str(int(hours * 3600) + DEADLINE_SLACK_SECONDS)]


def ended(job: Mapping[str, Any]) -> Ended:
    """A job's end; Ray knows the exit code of what it ran itself."""
    if job["status"] == "SUCCEEDED":
        return Ended(0)
    code = job.get("driver_exit_code")
    why = " ".join(str(job.get("message") or "").split())[:300]
    return Ended(code if code else None, f"{job['status'].lower()} on the Ray cluster: {why}")
