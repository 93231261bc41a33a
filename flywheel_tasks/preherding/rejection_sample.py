"""Stage `rejection-sample`: the best of k responses to this cycle's prompts become training data (Sec. 2.4.1, Alg. 1).

The data set is rebuilt in every cycle from its own traffic and pool, so it stays close to the policy that it trains.
"""

from __future__ import annotations

import pyarrow.compute as pc

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.prompts import near_policy
from flywheel_tasks.core.quarantine import quarantined, without
from flywheel_tasks.core.stage import Input, Inputs, Resources, Stage
from flywheel_tasks.preherding.rejection_config import RejectionConfig


def run(inputs: Inputs, config: RejectionConfig, out: Output) -> None:
    """Send each training prompt to the policy of the pool that suits it, draw k responses, score them with the
    pointwise preference model and the user signals, and keep the best one where its reward reaches the threshold.
    Gives all scored responses, accepted or not, the examples for SFT, and how the styles of the two differ."""
    from flywheel_tasks.preherding import sampling

    prompts = inputs["prompts"].read()
    learn = prompts.filter(pc.equal(prompts["split"], "train"))
    known, forgotten = without(learn, inputs.forgotten, "prompt_id")
    usable, refused = near_policy(known, config.older_versions)
    if not usable.num_rows:
        raise InputError(
            f"no prompt to sample from: {prompts.num_rows} came in, {prompts.num_rows - learn.num_rows} are held out "
            f"and {refused.num_rows} are from other model versions (rejection-sample.older_versions)"
        )
    out.reject(forgotten)
    out.reject(quarantined(refused, "prompt_id", "older_version"))
    sampled = sampling.run(usable, inputs, config, out)
    out.account("prompt", rows_in=learn.num_rows, rows_out=sampled.accepted)


STAGE = Stage(
    name="rejection-sample",
    phase="preherding",
    paper="Sec. 2.4.1, Algorithm 1",
    inputs={
        "prompts": Input("constrain", "prompts"),
        "characters": Input("ingest", "characters"),
        "reward": Input("preference-pointwise", "model"),
        "signals": Input("signal-rm", "model"),
        "before": Input("rejection-sample", "report", optional=True, previous=True),
    },
    outputs={"completions": "completion", "examples": "example", "report": "json", "style": "json"},
    config=RejectionConfig,
    run=run,
    models=("policy", "candidates"),
    data=("models/card.j2", "style"),
    resources=Resources(cpus=2, gpus=1, memory_gib=8),
)
