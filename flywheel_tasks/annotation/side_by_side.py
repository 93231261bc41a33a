"""Human comparison (Sec. 2.5.1): candidate and champion side by side before people, prior to release.

How a team has the number before it decides a HOLD. Where `side-by-side.folder` is set, the week sends pairs as soon as
both models have answered the held-out prompts, and goes on: `side-by-side-import` and the gate take what is there, at
first nothing. A HOLD then waits `promote.hold_hours` for a person. As answers arrive,

    flywheel run side-by-side-import --cycle C; flywheel run gate --cycle C

puts the human win-rate with its interval on the evidence page and in the report, as often as wanted, and `flywheel
answer` decides on the newest page; where people made it a BLOCK an approval is refused, and `flywheel run promote`
records the end. Without a folder nobody is asked and no engine starts.

Left and right are a keyed coin, no task names a model, and style is not bounded: people judge the models as they are.
A session goes on as in any interactive annotation: from either response, drawn at random whichever was preferred, and
the next week's two models answer what the person said next.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from flywheel_tasks.annotation import annotate_export, annotate_import, pairing
from flywheel_tasks.annotation.annotate_export import ExportConfig
from flywheel_tasks.annotation.annotate_import import ImportConfig
from flywheel_tasks.annotation.pairing import Made, Plan
from flywheel_tasks.core import schemas
from flywheel_tasks.core.config import ModelConfig
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.quarantine import quarantined, without
from flywheel_tasks.core.stage import Input, Inputs, Resources, Stage
from flywheel_tasks.core.store import Artifact
from flywheel_tasks.models.engine_config import EngineConfig, Sampling

MODE = "interactive"
SIDES = ("candidate", "champion")
"""The two policies, as `respond` calls them."""


class SideBySideConfig(ExportConfig):
    folder: str = Field(
        "", description="where the folders go, not annotate-export's: a path, s3:// or gs:// (empty: nobody is asked)"
    )
    count: int = Field(
        300, ge=1, description="held-out prompts that are compared; 300 answers tell a win-rate to about 6 points"
    )
    sessions: int = Field(
        100, ge=0, description="sessions of the last comparison that go on, at most; both models answer them here"
    )


def run(inputs: Inputs, config: SideBySideConfig, out: Output) -> None:
    """Send candidate and champion side by side to people: the same held-out prompts, sides by a coin, models unnamed.
    Empty, failed and equal responses stay, counted. Nothing is sent where no folder is configured; nothing waits."""
    if config.folder:
        pairs, left_out, about = _compared(inputs, config, out)
    else:
        pairs, left_out, about = schemas.get("pair").empty_table(), schemas.QUARANTINE.empty_table(), {}
    annotate_export.send(pairs, left_out, inputs, config, out, about)


def collect(inputs: Inputs, config: ImportConfig, out: Output) -> None:
    """Read what people answered side by side, by the rules of annotate-import, whenever it arrives; the gate makes it
    the human win-rate. The prompts are held out, so nothing is trained on these answers."""
    annotate_import.run(inputs, config, out)


def models(responses: Artifact) -> tuple[ModelConfig, ModelConfig]:
    """Candidate and champion that gave these responses."""
    champion = ModelConfig.model_validate(responses.manifest.config["champion"])
    record = responses.manifest.inputs["candidate"]
    path = f"{responses.storage.uri}/artifacts/{record.stage}/{record.key}/{record.output}"
    return champion.model_copy(update={"path": path}), champion


def _compared(inputs: Inputs, config: SideBySideConfig, out: Output) -> tuple[pa.Table, pa.Table, dict[str, Any]]:
    """The pairs, those that stay as quarantine rows, and what the report says of them."""
    artifact, output = inputs.artifact("responses")
    pool = models(artifact)
    made = _answered(artifact.table(output).read(), pool)
    prompts = inputs["prompts"].read()
    answered = pa.array([prompt for prompt, sides in made.items() if len(sides) == len(pool)], pa.string())
    asked, gone = without(prompts.filter(pc.is_in(prompts["prompt_id"], answered)), inputs.forgotten, "prompt_id")
    said = inputs.get("sessions")
    going_on, ended = without(said.read() if said else schemas.PROMPT.empty_table(), inputs.forgotten, "prompt_id")
    luck = pairing.draws(out.seed, "session", going_on["prompt_id"].to_pylist())
    going_on = going_on.take(pa.array(np.argsort(luck, kind="stable")[: config.sessions]))
    planned = pairing.plan(
        asked, {MODE: going_on}, count=config.count + len(going_on), pool=len(pool), kinds=(), rewrite_share=0.0,
        modes={MODE: 1.0}, seed=out.seed,
    )  # fmt: skip
    if len(going_on):
        made |= _continued(planned, set(going_on["prompt_id"].to_pylist()), pool, inputs, out)
    ids = planned.prompts["prompt_id"].to_pylist()
    first, second = (
        [made[prompt][place] for prompt, place in zip(ids, places.tolist(), strict=True)]
        for places in (planned.first, planned.second)
    )
    table, reasons = pairing.assemble(planned, first, second, None)
    stays = quarantined(table.filter(pc.is_valid(reasons)), "pair_id", reasons.drop_null().to_pylist())
    about = {
        "candidate": pool[0].name, "champion": pool[1].name, "compared": len(table), "sessions_going_on": len(going_on),
        "not_shown": dict(sorted(Counter(stays["reason"].to_pylist()).items())),
    }  # fmt: skip
    return table.filter(pc.is_null(reasons)), pa.concat_tables([gone, ended, stays]), about


def _answered(responses: pa.Table, pool: tuple[ModelConfig, ...]) -> dict[str, dict[int, Made]]:
    """Prompt → place in the pool → the model's first response. A response that was cut off is what users would read."""
    from flywheel_tasks.annotation.responses import made_of, policy_names

    made: dict[str, dict[int, Made]] = {}
    for place, (side, name) in enumerate(zip(SIDES, policy_names(pool), strict=True)):
        mine = responses.filter(pc.and_(pc.equal(responses["policy"], side), pc.equal(responses["sample"], 0)))
        for row in mine.select(["prompt_id", "text", "finish", "reason"]).to_pylist():
            made.setdefault(row["prompt_id"], {})[place] = made_of(row, name, keep_unfinished=True)
    return made


def _continued(
    planned: Plan, sessions: set[str], pool: tuple[ModelConfig, ...], inputs: Inputs, out: Output
) -> dict[str, dict[int, Made]]:
    """The same for sessions that go on: both models answer now, as `respond` had them answer."""
    from flywheel_tasks.annotation.responses import respond
    from flywheel_tasks.models.generate import cards

    how = inputs.artifact("responses")[0].manifest.config
    sampling, engine = Sampling.model_validate(how["sampling"]), EngineConfig.model_validate(how["engine"])
    sampling = sampling.model_copy(update={"k": 1}).seeded(out.seed)
    rows = np.array([prompt in sessions for prompt in planned.prompts["prompt_id"].to_pylist()])
    part = Plan(planned.prompts.filter(pa.array(rows)), *(column[rows] for column in planned[1:]))
    first, second = respond(
        part, pool, pool[0], cards(inputs["characters"].read()), sampling, sampling, engine,
        keep_unfinished=True, partial=out.partial,
    )  # fmt: skip
    places = zip(part.first.tolist(), part.second.tolist(), strict=True)
    pairs = zip(part.prompts["prompt_id"].to_pylist(), places, first, second, strict=True)
    return {prompt: {one: a, other: b} for prompt, (one, other), a, b in pairs}


STAGE = Stage(
    name="side-by-side",
    phase="evaluation",
    paper="Sec. 2.5.1",
    inputs={
        "responses": Input("respond", "responses"),
        "prompts": Input("constrain", "prompts"),
        "characters": Input("ingest", "characters"),
        "earlier": Input("side-by-side", "tasks", optional=True, previous=True),
        "sessions": Input("side-by-side-import", MODE, optional=True, previous=True),
    },
    outputs={"tasks": "task", "report": "json"},
    config=SideBySideConfig,
    run=run,
    resources=Resources(cpus=2, gpus=1, memory_gib=16),
    uses_user_key=True,
    uses_cycle=True,
    data=("annotation/questions.yaml", "annotation/CONTRACT.md", "models/card.j2"),
)
IMPORT = replace(
    annotate_import.STAGE,
    name="side-by-side-import",
    phase="evaluation",
    paper="Sec. 2.5.1",
    inputs={
        "tasks": Input("side-by-side", "tasks"),
        "export": Input("side-by-side", "report"),
        "filter": Input("filter", "report", optional=True),
        "earlier": Input("side-by-side-import", "annotations", optional=True, previous=True),
        "earlier_report": Input("side-by-side-import", "report", optional=True, previous=True),
    },
    run=collect,
)
