"""promote: what follows from the gate's decision (Sec. 2.6): a candidate for the A/B test, a wait, or an end.

PASS nominates the candidate, BLOCK refuses it and the champion stays, HOLD leaves the ledger as it is until a person
answers (`flywheel answer`, which the Airflow task calls) or the time for it is over.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from flywheel_tasks.core.config import StageConfig
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.stage import Input, Inputs, Resources, Stage
from flywheel_tasks.core.store import Store
from flywheel_tasks.release.champion import answered_as, conclude

Outcome = Literal["promoted", "held", "blocked"]
OUTCOME: dict[str, Outcome] = {"PASS": "promoted", "HOLD": "held"}
"""Any other word of the gate blocks."""


class PromoteConfig(StageConfig):
    max_age_days: float = Field(14, gt=0, le=36_500, description="a gate's decision that is older promotes nothing")
    hold_hours: float = Field(
        72,
        gt=0,
        le=8_760,
        description="how long a HOLD waits for a person before it is refused; the DAG's task reads it",
    )


def run(inputs: Inputs, config: PromoteConfig, out: Output) -> None:
    """Act on the gate's decision: PASS nominates the candidate for its A/B arm, HOLD waits for a person, BLOCK ends.

    The store's ledger records it once, whoever runs this and how often; the champion does not change here.
    """
    gate, _ = inputs.artifact("decision")
    responses, _ = inputs.artifact("responses")
    decision = gate.json("decision")
    model = answered_as(responses, "candidate")
    outcome: Outcome = OUTCOME.get(str(decision.get("decision")), "blocked")
    conclude(Store(out.store_uri), gate, model, config.max_age_days)
    out.json(
        "promotion",
        {
            "outcome": outcome,
            "decision": decision.get("decision"),
            "reasons": decision.get("reasons", []),
            "candidate": str(model) if model else None,
            "candidate_path": model.path(out.store_uri) if model else None,
            "gate": f"{gate.manifest.stage}/{gate.manifest.key}",
        },
    )
    for word in ("promoted", "held", "blocked"):
        out.metric(f"promote.{word}", float(outcome == word))


STAGE = Stage(
    name="promote",
    phase="release",
    paper="Sec. 2.5.2, 2.6",
    inputs={"decision": Input("gate", "decision"), "responses": Input("respond", "report")},
    outputs={"promotion": "json"},
    config=PromoteConfig,
    run=run,
    resources=Resources(cpus=1, memory_gib=1),
    uses_cycle=True,
)
