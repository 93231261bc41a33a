"""Pairs: two alternative responses for each curated prompt (Sec. 2.2.2), filtered so that style can't decide."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator, model_validator

from flywheel_tasks.annotation import pairing, rewriting
from flywheel_tasks.core import schemas
from flywheel_tasks.core.config import ModelConfig, StageConfig, model_of
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.quarantine import without
from flywheel_tasks.core.stage import Input, Inputs, Resources, Stage
from flywheel_tasks.models.engine_config import EngineConfig, SamplingConfig

SESSIONS = ("interactive", "steerability")
"""Modes that go on turn by turn, from what annotate-import of an earlier cycle gives back."""


class PairsConfig(StageConfig):
    count: int = Field(2000, ge=1, description="pairs to make, sessions that go on included")
    policy: ModelConfig = model_of("policy", "first policy of the pool; alone, it gives both responses of a pair")
    candidates: tuple[ModelConfig, ...] = model_of("candidates", "further policies of the pool")
    rewriter: ModelConfig | None = Field(None, description="model that rewrites (none: the policy)")
    rewrite_share: float = Field(0.5, ge=0, le=1, description="share of pairs made by chain-of-thought rewriting")
    rewrites: tuple[str, ...] = Field((), description="kinds of rewrite that are used (none: all of rewriting.yaml)")
    modes: dict[Literal["static", "interactive", "steerability"], float] = Field(
        {"static": 0.8, "interactive": 0.1, "steerability": 0.1},
        min_length=1,
        description="shares of annotation modes among new pairs; a pair with a tool call is an image pair",
    )
    bounds: pairing.Bounds = Field(pairing.Bounds(), description="the widest style differences within a pair")
    sampling: SamplingConfig = Field(
        SamplingConfig(temperature=1.0, max_tokens=256), description="how responses are drawn"
    )
    rewrite_sampling: SamplingConfig = Field(
        SamplingConfig(temperature=0.7, max_tokens=768), description="how rewrites are drawn"
    )
    keep_unfinished: bool = Field(False, description="keep responses that were cut at sampling.max_tokens")
    engine: EngineConfig = Field(EngineConfig(), description="the generation engine")

    @field_validator("rewrites")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        rewriting.kinds(value)
        return value

    @field_validator("modes")
    @classmethod
    def _shares(cls, value: dict[str, float]) -> dict[str, float]:
        if min(value.values()) < 0 or sum(value.values()) <= 0:
            raise ValueError("shares are at least 0 and not all 0")
        return value

    @model_validator(mode="after")
    def _one_at_a_time(self) -> PairsConfig:
        if self.sampling.k != 1 or self.rewrite_sampling.k != 1:
            raise ValueError("sampling.k stays 1: a pair takes one response of each kind")
        if not self.candidates and self.sampling.temperature == 0 and self.rewrite_share < 1:
            raise ValueError("one policy at temperature 0 gives the same response twice: add candidates, or heat")
        return self


def run(inputs: Inputs, config: PairsConfig, out: Output) -> None:
    """Draw prompts, make two responses for each (two policies of the pool, or one and its rewrite by an expert
    chain-of-thought prompt), and drop pairs that are identical, malformed, hold an identifier or differ too much in
    length, emoji, lists or markdown. The report says what was dropped and why."""
    from flywheel_tasks.annotation.responses import respond
    from flywheel_tasks.models.generate import cards

    pool = (config.policy, *config.candidates)
    prompts, *gone = without(inputs["prompts"].read(), inputs.forgotten, "prompt_id")
    sessions: dict[str, pa.Table] = {}
    for mode in SESSIONS:
        if table := inputs.get(mode):
            sessions[mode], theirs = without(table.read(), inputs.forgotten, "prompt_id")
            gone.append(theirs)
    forgotten = pa.concat_tables(gone)
    planned = pairing.plan(
        prompts,
        sessions,
        count=config.count,
        pool=len(pool),
        kinds=rewriting.kinds(config.rewrites) if config.rewrite_share else (),
        rewrite_share=config.rewrite_share,
        modes={str(mode): share for mode, share in config.modes.items()},
        seed=out.seed,
    )
    first, second = respond(
        planned, pool, config.rewriter or config.policy, cards(inputs["characters"].read()),
        config.sampling.seeded(out.seed), config.rewrite_sampling.seeded(out.seed), config.engine,
        keep_unfinished=config.keep_unfinished, partial=out.partial,
    )  # fmt: skip
    table, reasons = pairing.assemble(planned, first, second, config.bounds)
    kept = table.filter(pc.is_null(reasons))
    with out.table("pairs") as writer:
        writer.write(kept)
    dropped = table.filter(pc.is_valid(reasons))
    out.reject(_quarantine(dropped, reasons.drop_null()))
    out.reject(forgotten)
    out.account("pair", rows_in=len(table) + len(forgotten), rows_out=len(kept))
    out.json("report", report(len(prompts), sessions, planned, table, reasons))
    out.metric("kept", len(kept) / len(table) if len(table) else 0.0)


def report(
    available: int, sessions: Mapping[str, pa.Table], planned: pairing.Plan, table: pa.Table, reasons: pa.Array
) -> dict[str, Any]:
    """Counts by how a pair was made, and the mean style differences before and after the filter. Rewrites are compared
    with their originals, so a one-sided drift (all rewrites shorter, say) shows even where every pair is in bounds."""
    made = [kind or "policy_pool" for kind in planned.kind]
    kept = pc.is_null(reasons).to_numpy(zero_copy_only=False)
    dropped: dict[str, Counter[str]] = {}
    for how, reason in zip(made, reasons.to_pylist(), strict=True):
        if reason:
            dropped.setdefault(how, Counter())[reason] += 1
    sign = np.where(planned.swap, -1, 1)
    by_kind = {}
    for how in sorted(set(made)):
        mine = np.array([m == how for m in made])
        by_kind[how] = {
            "made": int(mine.sum()),
            "kept": int((mine & kept).sum()),
            "dropped": dict(sorted(dropped.get(how, Counter()).items())),
            "mean_first_minus_second": {
                when: {name: _mean((sign * table[name].to_numpy())[mine & which]) for name in pairing.DELTAS}
                for when, which in (("all", np.ones(len(kept), bool)), ("kept", kept))
            },
        }
    return {
        "prompts_available": available,
        "sessions_going_on": {mode: len(rows) for mode, rows in sessions.items()},
        "made": len(table),
        "kept": int(kept.sum()),
        "by_reason": dict(sorted(Counter(filter(None, reasons.to_pylist())).items())),
        "by_mode": dict(sorted(Counter(table["mode"].filter(pa.array(kept)).to_pylist()).items())),
        "by_kind": by_kind,
        "rewriting_version": rewriting.templates().version,
    }


def _mean(values: Any) -> float | None:
    return round(float(values.mean()), 4) if len(values) else None


def _quarantine(dropped: pa.Table, reasons: pa.Array) -> pa.Table:
    """Ids and a reason; the texts themselves are not kept, one may hold an identifier."""
    where = pc.binary_join_element_wise("prompts", dropped["prompt_id"], ":")
    nothing = pa.nulls(len(dropped), pa.string())
    return pa.table([dropped["pair_id"], reasons, where, dropped["user"], nothing], schema=schemas.QUARANTINE)


STAGE = Stage(
    name="pairs",
    phase="annotation",
    paper="Sec. 2.2.2, 2.7",
    inputs={
        "prompts": Input("constrain", "prompts"),
        "characters": Input("ingest", "characters"),
        "interactive": Input("annotate-import", "interactive", optional=True, previous=True),
        "steerability": Input("annotate-import", "steerability", optional=True, previous=True),
    },
    outputs={"pairs": "pair", "report": "json"},
    config=PairsConfig,
    run=run,
    resources=Resources(cpus=2, gpus=1, memory_gib=16),
    models=("policy", "candidates", "rewriter"),
    data=("annotation/rewriting.yaml", "style"),
)
