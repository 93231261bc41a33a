"""Constraint-based adjustment: hard bounds and distribution targets over the curated prompts (Sec. 2.2.1 Phase III,
Table 1)."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field, field_validator

from flywheel_tasks.core import schemas
from flywheel_tasks.core.config import ModelConfig, StageConfig, model_of
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.quarantine import FORGOTTEN, theirs
from flywheel_tasks.core.stage import Input, Inputs, Resources, Stage
from flywheel_tasks.curation.scoring import ScoringConfig

if TYPE_CHECKING:
    from flywheel_tasks.curation.cells import Dimension
    from flywheel_tasks.curation.select import Selection

DimensionName = Literal["locale", "language", "jtbd", "depth", "quality", "difficulty"]
DIMENSIONS: tuple[DimensionName, ...] = ("locale", "language", "jtbd", "depth", "quality", "difficulty")
_COLUMNS = ["prompt_id", "character_id", "first_turn", *DIMENSIONS]


class ConstrainConfig(StageConfig):
    first_turn_floor: float = Field(0.10, ge=0, le=1, description="least share of first turns")
    character_cap: float = Field(0.03, gt=0, le=1, description="largest share of any one character")
    targets: dict[DimensionName, Literal["original"] | dict[str, float]] = Field(
        {},
        description="per dimension 'original' (as in the traffic, the default) or a share per value; values left out "
        "share the rest as in the traffic",
    )
    weights: dict[DimensionName, float] = Field(
        {}, description="weight of a dimension's distance to its target (default 1; 0: monitor only)"
    )
    tolerance: float | None = Field(
        None,
        gt=0,
        le=1,
        description="give up rows until every weighted dimension is within this total-variation distance of its "
        "target (null: size comes first)",
    )
    size: int | None = Field(None, ge=1, description="take at most this many prompts")
    least_rows: int = Field(1, ge=1, description="a subset smaller than this counts as none")
    buckets: int = Field(3, ge=2, le=20, description="quantile buckets of quality and difficulty: q1 (lowest), q2, …")
    on_infeasible: Literal["stop", "relax"] = Field(
        "stop",
        description="when no subset meets the bounds: stop and say why, or apply the smallest relaxation and report it",
    )
    policy: ModelConfig = model_of("policy", "the policy in production, whose responses tell quality and difficulty")
    scoring: ScoringConfig = Field(
        ScoringConfig(), description="how prompts are scored once an earlier cycle has trained a preference model"
    )

    def weight(self, name: str) -> float:
        return next((weight for key, weight in self.weights.items() if key == name), 1.0)

    @field_validator("targets")
    @classmethod
    def _shares(cls, targets: dict[str, Any]) -> dict[str, Any]:
        for name, wanted in targets.items():
            if isinstance(wanted, dict) and (
                min(wanted.values(), default=0) < 0 or not 0 < sum(wanted.values()) <= 1 + 1e-9
            ):
                raise ValueError(
                    f"the shares of '{name}' must not be negative and must add up to at most 1, and above 0"
                )
        return targets

    @field_validator("weights")
    @classmethod
    def _not_negative(cls, weights: dict[str, float]) -> dict[str, float]:
        if any(weight < 0 for weight in weights.values()):
            raise ValueError("a weight must not be negative; 0 leaves a dimension out")
        return weights


def run(inputs: Inputs, config: ConstrainConfig, out: Output) -> None:
    """Choose the largest subset that meets the hard bounds (first turns, per-character cap) and is nearest to the
    targets for locale, language, job to be done, depth, quality and difficulty. Bounds that no subset meets stop the
    stage, with the smallest relaxation that would do. Quality and difficulty come from the last cycle's preference
    model; in a first cycle they are absent."""
    from flywheel_tasks.curation import select

    source = inputs["prompts"]
    artifact, name = inputs.artifact("report")
    table = source.read(_COLUMNS)
    if not table.num_rows:
        raise InputError(
            "constrain: diversify kept no prompts, so there is nothing to choose from; its quarantine says why"
        )
    scores = _scores(inputs, config, out)
    table = _with(table, scores)
    dimensions, absent = _dimensions(table, artifact.json(name).get("traffic", {}), config)
    chosen = select.select(table, [d for d in dimensions if config.weight(d.name) > 0], config, out.seed)
    forgotten = theirs(source.read(["user"])["user"], inputs.forgotten)
    chosen = replace(chosen, rows=chosen.rows & ~forgotten)
    _write(source, scores, chosen, forgotten, out)
    report = _report(table, dimensions, absent, chosen, config)
    out.json("report", report | {"scored": table.num_rows - table["difficulty"].null_count})
    out.account("prompt", rows_in=table.num_rows, rows_out=int(chosen.rows.sum()))
    out.metric("first_turn_share", chosen.first_turn_share)
    out.metric("largest_character_share", chosen.largest_character_share)
    for d in dimensions:
        out.metric(f"distance_{d.name}", d.distance(d.shares(chosen.rows)))


def _scores(inputs: Inputs, config: ConstrainConfig, out: Output) -> pa.Table | None:
    """Quality and difficulty of every prompt, or None before the first preference model."""
    from flywheel_tasks.curation.scoring import scored
    from flywheel_tasks.models.resolve import artifact_folder

    reward = inputs.maybe("reward")
    if reward is None or not config.scoring.prompts:
        return None
    characters = inputs["characters"].read()
    return scored(inputs["prompts"], characters, config.policy, artifact_folder(*reward), config.scoring, out)


def _with(table: pa.Table, scores: pa.Table | None) -> pa.Table:
    if scores is not None:
        for name in scores.column_names:
            table = table.set_column(table.schema.get_field_index(name), name, scores[name])
    return table


def _dimensions(
    table: pa.Table, traffic: dict[str, dict[str, int]], config: ConstrainConfig
) -> tuple[list["Dimension"], list[DimensionName]]:
    """The dimensions that have values, and the names of those that have none."""
    from flywheel_tasks.curation import cells

    absent = [name for name in DIMENSIONS if table[name].null_count == table.num_rows]
    return [
        cells.dimension(
            name, cells.labels(table[name], config.buckets), traffic.get(name), config.targets.get(name, "original")
        )
        for name in DIMENSIONS
        if name not in absent
    ], absent


def _write(
    source: Any, scores: pa.Table | None, chosen: "Selection", forgotten: NDArray[np.bool_], out: Output
) -> None:
    at = 0
    with out.table("prompts") as writer:
        for batch in source.batches():
            rows = slice(at, at + batch.num_rows)
            at += batch.num_rows
            measured = None if scores is None else scores.slice(rows.start, batch.num_rows)
            table = _with(pa.Table.from_batches([batch]), measured)
            writer.write(table.filter(pa.array(chosen.rows[rows])))
            left = ~chosen.rows[rows]
            gone, nobody = table.filter(pa.array(left)), forgotten[rows][left]
            reason = np.where(chosen.at_cap[rows][left], "character_cap", "rebalanced")
            reason = np.where(nobody, FORGOTTEN, reason)
            out.reject(pa.table(
                {
                    "row_id": gone["prompt_id"],
                    "reason": pa.array(reason.tolist(), pa.string()),
                    "where": pa.array(["diversify.prompts"] * gone.num_rows, pa.string()),
                    "user": pc.if_else(pa.array(nobody), pa.scalar(None, pa.string()), gone["user"]),
                    "raw": pa.nulls(gone.num_rows, pa.string()),
                },
                schema=schemas.QUARANTINE,
            ))  # fmt: skip
            out.progress(at, source.rows)


def _report(
    table: pa.Table,
    dimensions: list["Dimension"],
    absent: list[DimensionName],
    chosen: "Selection",
    config: ConstrainConfig,
) -> dict[str, Any]:
    return {
        "candidates": table.num_rows,
        "selected": int(chosen.rows.sum()),
        "largest_feasible": chosen.largest,
        "hard_bounds": {
            "first_turn": {
                "asked": config.first_turn_floor,
                "applied": chosen.floor,
                "reached": chosen.first_turn_share,
            },
            "character": {
                "asked": config.character_cap,
                "applied": chosen.cap,
                "reached": chosen.largest_character_share,
                "at_cap": chosen.capped,
            },
        },
        "relaxed": chosen.relaxed,
        "absent_dimensions": absent,
        "dimensions": {d.name: _described(d, chosen.rows, config) for d in dimensions},
        "optimality_gap_rows": chosen.gap_rows,
    }


def _described(d: "Dimension", rows: NDArray[np.bool_], config: ConstrainConfig) -> dict[str, Any]:
    before, after = d.shares(), d.shares(rows)
    return {
        "target": d.source,
        "weight": config.weight(d.name),
        "distance_before": d.distance(before),
        "distance_after": d.distance(after),
        "unattainable": [v for v, t, b in zip(d.values, d.target, before, strict=True) if t > 0 and b == 0],
        "values": {
            v: {"target": float(t), "candidates": float(b), "selected": float(a)}
            for v, t, b, a in zip(d.values, d.target, before, after, strict=True)
        },
    }


STAGE = Stage(
    name="constrain",
    phase="curation",
    paper="Sec. 2.2.1 Phase III, Table 1",
    inputs={
        "prompts": Input("diversify", "prompts"),
        "report": Input("diversify", "report"),
        "characters": Input("ingest", "characters"),
        "reward": Input("preference-pointwise", "model", optional=True, previous=True),
    },
    outputs={"prompts": "prompt", "report": "json"},
    config=ConstrainConfig,
    run=run,
    models=("policy",),
    data=("models/card.j2",),
    resources=Resources(cpus=2, gpus=1, memory_gib=8),
)
