"""What `flywheel readout` does, without the command line around it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flywheel_tasks.core.terminal import Table
from flywheel_tasks.release.parts import find
from flywheel_tasks.release.plan import LIFTS, Plan
from flywheel_tasks.release.plan import plan as plan_parts
from flywheel_tasks.release.plot import forest
from flywheel_tasks.release.read import read_out
from flywheel_tasks.release.readout_config import ReadoutConfig
from flywheel_tasks.release.result import ReadoutResult

_KEY = re.compile(
    r"\breadout\.(allocation|start|time_zone)\b|\b(as_of|bad_rows|missing_days|naive_zone|partition_bits|pre_days)\b"
)


def read_out_files(
    exposures: str | Sequence[str], activity: str | Sequence[str], config: ReadoutConfig, plot: Path | None = None
) -> ReadoutResult:
    """A readout of local Parquet files or globs."""
    result = read_out(find(exposures, "exposures"), find(activity, "activity"), config)
    if plot is not None:
        forest(result, plot)
    return result


def plan_files(
    activity: str | Sequence[str],
    config: ReadoutConfig,
    share: float,
    power: float,
    tests: int,
    units: int | None = None,
) -> Plan:
    """A plan from local Parquet files or globs."""
    return plan_parts(find(activity, "activity"), config, share, power, tests, units)


def render_plan(found: Plan) -> list[Any]:
    """The plan, ready for `terminal.show`."""
    per_arm = found.metrics[0].units_per_arm
    head = ("", "mean", "sd", "MDE", *(f"n at {100 * x:g}%" for x in LIFTS))
    rows = [
        (m.metric, f"{m.mean:.4g}", f"{m.sd:.4g}", f"{m.minimum_detectable_lift_pct:.3g}%",
         *m.units_for_lift_pct.values())
        for m in found.metrics
    ]  # fmt: skip
    return [
        f"baseline {found.first} to {found.last}, {found.units_seen:,} units; {per_arm:,} units per arm; "
        f"alpha {found.alpha:g} over {found.tests} claims, power {found.power:g}",
        Table(head, rows),
        "MDE: the smallest lift that is seen; n at a lift: exposed units per arm that see it",
    ]


def in_flags(result: ReadoutResult) -> ReadoutResult:
    """The result with its problems and warnings in the words of the command line."""
    return replace(
        result,
        problems=[flagged(text) for text in result.problems],
        warnings=[flagged(text) for text in result.warnings],
        decisions=[d._replace(reasons=[flagged(text) for text in d.reasons]) for d in result.decisions],
    )


def flagged(text: str) -> str:
    """Names of configuration keys as the options that set them."""
    return _KEY.sub(lambda found: option(found[1] or found[2]), text)


def option(field: str) -> str:
    """The option that sets a field of the configuration."""
    one = {"missing_days": "missing_day", "segments": "segment"}.get(field, field)
    return "--" + one.replace("_", "-")
