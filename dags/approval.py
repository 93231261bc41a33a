"""A person's answer to a HOLD of the gate (Sec. 2.6): asked in Airflow's UI, kept in the store's ledger by `flywheel`.

Silence is an answer too: after promote's `hold_hours` the candidate is refused.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.sdk import Param
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException
from launch import printable

from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.core.terminal import visible
from flywheel_tasks.release import ledger

APPROVE, REJECT = "Approve", "Reject"
WORDS = {APPROVE: "approve", REJECT: "reject"}


class Approval(HITLOperator):
    custom_operator_name = "a person's answer"
    template_fields: Sequence[str] = ()
    command: Sequence[str] = (sys.executable, "-m", "flywheel_tasks.cli")

    def __init__(self, *, after: str, **kwargs: Any) -> None:
        super().__init__(
            subject="The gate says HOLD: promote this cycle's candidate?", options=[APPROVE, REJECT], **kwargs
        )
        self.after = after

    def execute(self, context: Mapping[str, Any]) -> Any:
        artifact = self.promotion(context)
        said = artifact.json("promotion")
        if said["outcome"] != "held":
            raise AirflowSkipException(f"the gate said {said['decision']}: nobody has to decide")
        known = ledger.read(artifact.storage)
        if before := known.find("nominate", said["gate"]) or known.find("refuse", said["gate"]):
            raise AirflowSkipException(f"{before.by} answered before ({before.action}): nobody is asked twice")
        self.response_timeout = timedelta(hours=artifact.manifest.config["hold_hours"])
        self.body = page(artifact, said)
        self.log.info("%s", self.body)
        return super().execute(context)

    def execute_complete(self, context: Mapping[str, Any], event: dict[str, Any]) -> str:
        if event.get("error_type") == "timeout":
            return self.answer(context, "timeout", "nobody", "nobody answered in time")
        given = super().execute_complete(context, event)
        by = given["responded_by_user"]
        name = str((by or {}).get("name") or (by or {}).get("id") or "unknown") if isinstance(by, dict) else str(by)
        said, why = WORDS[given["chosen_options"][0]], str(given["params_input"].get("why", "")).strip()
        if said == "approve" and not why:
            raise AirflowException("an approval says why: the question is asked again")
        return self.answer(context, said, name, why)

    def answer(self, context: Mapping[str, Any], said: str, by: str, why: str) -> str:
        """Hand the answer to `flywheel answer`, which keeps the first one and refuses another."""
        artifact = self.promotion(context)
        argv = [*self.command, "answer", said, f"--cycle={artifact.manifest.cycle}", f"--by={by}", f"--why={why}"]
        argv += [f"--gate={artifact.json('promotion')['gate']}"]
        argv += [f"--profile={context['params']['profile']}", f"--set=store.uri={artifact.storage.uri}"]
        done = subprocess.run(argv, capture_output=True, timeout=300)
        for line in (done.stdout + done.stderr).splitlines():
            self.log.info("%s", printable(line))
        if done.returncode:
            raise AirflowFailException(f"the answer was not taken: {printable(done.stderr)[-300:]}")
        return artifact.uri

    def promotion(self, context: Mapping[str, Any]) -> Artifact:
        """What promote left in this run."""
        uri = context["ti"].xcom_pull(task_ids=self.after)
        if not uri:
            raise AirflowSkipException(f"{self.after} was skipped: there is nothing to decide")
        return Store(uri.split(f"/artifacts/{self.after}/")[0]).by_uri(uri)


def form() -> dict[str, Param]:
    """What the person fills in beside the answer."""
    # Airflow starts no task whose parameter has no valid default, so an empty reason is refused afterwards.
    why = Param("", type="string", title="Why", description="Kept in the ledger, with your name.")
    return {"why": why}


def page(artifact: Artifact, said: Mapping[str, Any]) -> str:
    """What the person sees; everything measured is on the evidence page."""
    reasons = [f"- `{visible(reason).replace('`', '')}`" for reason in said["reasons"]]
    gate = Store(artifact.storage.uri).resolve(said["gate"]).manifest
    facts = [
        f"**Cycle** {artifact.manifest.cycle}",
        f"**Candidate** `{said['candidate']}`",
        "**Why it is held**\n\n" + "\n".join(reasons or ["- no reason given"]),
        f"**Evidence** `{artifact.storage.uri}/{gate.folder}/{gate.outputs['page'].files[0].path}`",
        f"Without an answer within {artifact.manifest.config['hold_hours']:g} hours the candidate is refused.",
    ]
    return "\n\n".join(facts)
