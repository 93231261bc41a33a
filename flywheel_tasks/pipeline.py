"""The one list of stages, in the order of the loop. The command line and the DAGs are derived from it alone."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from flywheel_tasks.annotation import annotate_export, annotate_import, pairs, side_by_side
from flywheel_tasks.core.config import FlywheelConfig, load
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.stage import Stage
from flywheel_tasks.curation import constrain, diversify, filter, ingest
from flywheel_tasks.evaluation import benchmarks, gate_stage, metrics, respond, winrate
from flywheel_tasks.herding import dpo, rl, sft
from flywheel_tasks.preherding import preference_rm, rejection_sample, signal_rm
from flywheel_tasks.release import expose, promote, readout

STAGES: tuple[Stage, ...] = (
    ingest.STAGE,
    filter.STAGE,
    diversify.STAGE,
    constrain.STAGE,
    pairs.STAGE,
    annotate_export.STAGE,
    annotate_import.STAGE,
    preference_rm.POINTWISE,
    preference_rm.PAIRWISE,
    signal_rm.STAGE,
    rejection_sample.STAGE,
    sft.STAGE,
    dpo.STAGE,
    rl.STAGE,
    respond.STAGE,
    side_by_side.STAGE,
    side_by_side.IMPORT,
    metrics.STAGE,
    benchmarks.STAGE,
    winrate.STAGE,
    gate_stage.STAGE,
    promote.STAGE,
    expose.STAGE,
    readout.STAGE,
)


def by_name(name: str) -> Stage:
    """The stage called `name`."""
    for stage in STAGES:
        if stage.name == name:
            return stage
    near = get_close_matches(name, [stage.name for stage in STAGES], 1)
    meant = f": did you mean '{near[0]}'?" if near else ":"
    raise InputError(f"no stage '{name}'{meant} `flywheel stages` lists them")


def load_config(profile: str | None = None, file: str | None = None, overrides: Iterable[str] = ()) -> FlywheelConfig:
    """The configuration of the whole pipeline."""
    return load({stage.name: stage.config for stage in STAGES}, profile, file, overrides)


def until(last: Stage | None) -> tuple[Stage, ...]:
    """The stages of a cycle up to `last`, or all of them."""
    stages = weekly()
    return stages[: stages.index(last) + 1] if last else stages


def weekly() -> tuple[Stage, ...]:
    """The stages of one cycle; the daily ones read the A/B test afterwards."""
    return tuple(stage for stage in STAGES if stage.schedule == "weekly")
