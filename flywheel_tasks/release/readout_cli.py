"""What `flywheel readout` does, without the command line around it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from flywheel_tasks.release.parts import find
from flywheel_tasks.release.plan import LIFTS, Plan
from flywheel_tasks.release.plan import plan as plan_parts
from flywheel_tasks.release.plot import forest
from flywheel_tasks.release.read import read_out
from flywheel_tasks.release.readout_config import ReadoutConfig
from flywheel_tasks.release.result import ReadoutResult


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


def render_plan(found: Plan) -> Group:
    """The plan as a table."""
    per_arm = found.metrics[0].units_per_arm
    head = (
        f"baseline {found.first} to {found.last}, {found.units_seen:,} units; {per_arm:,} units per arm; "
        f"alpha {found.alpha:g} over {found.tests} claims, power {found.power:g}. MDE: the smallest lift that is seen; "
        "n at a lift: exposed units per arm that see it"
    )
    table = Table("", "mean", "sd", "MDE", *(f"n at {100 * x:g} %" for x in LIFTS), box=SIMPLE_HEAD)
    for m in found.metrics:
        counts = (f"{n:,}" for n in m.units_for_lift_pct.values())
        table.add_row(m.metric, f"{m.mean:.4g}", f"{m.sd:.4g}", f"{m.minimum_detectable_lift_pct:.3g} %", *counts)
    return Group(head, table)
